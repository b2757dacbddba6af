"""Bugs for the hunt: each makes a small run sick; what is wrong can be told from its metrics.

Each is a right solution of a problem, p3o.py's own or one of right.py, with some text replaced. The
figures are those of `p3o.py --small` with seed 0; a healthy run starts stage 3 at an entropy of 8
nats and a length of 15, ends near a KL of 3 and a score of 1, and wins 0.9.
"""

from typing import NamedTuple


class Sick(NamedTuple):
    diagnosis: str  # what students choose from
    solution: str
    old: str
    new: str
    symptom: str  # for the instructor

    @property
    def problem(self) -> str:
        return self.solution.split("__")[0]


SICK = [
    Sick(
        "The token that ends a response is not counted as part of it.",
        "collate__fill",
        "mask[i, len(p) : lengths[i]] = True",
        "mask[i, len(p) : lengths[i] - 1] = True",
        "Nobody learns to stop: finished_sft is 0 though SFT's loss is fine, every response "
        "is as long as it may be, and the answers run on after they were complete. The later "
        "stages work as well as they can: the score rises, the KL settles.",
    ),
    Sick(
        "The prompt is counted as part of the response.",
        "collate__pad_twice",
        "torch.zeros(len(p))",
        "torch.ones(len(p))",
        "The answers in output.txt begin with the question. Responses are ten tokens longer "
        "than the data's from the first iteration on, their entropy is 13.7 where 7.9 is "
        "healthy; the KL falls back to 0 and below, since the policy also moves on tokens "
        "that it did not draw.",
    ),
    Sick(
        "Log-probabilities are read where the model has already seen the token.",
        "response_logprobs__gather",
        "hidden[row, column - 1]",
        "hidden[row, column]",
        "Too good to be true: the SFT loss falls to 0.00, where 0.5 is healthy, since to "
        "repeat what one reads is easy. What such a model samples is no language, and never "
        "ends.",
    ),
    Sick(
        "What is drawn after the end of a response is counted as part of it.",
        "sample",
        "(unread != model.config.eos_token_id).nonzero()",
        "torch.ones_like(unread).nonzero()",
        "Stages 1 and 2 are healthy. But all responses are as long as they may be (40 tokens "
        "from the first iteration on, where 15 is healthy), though all hold an EOS "
        "(response/finished is 1), and the answers start anew after they were complete.",
    ),
    Sick(
        "Responses are drawn at another temperature than they are scored at.",
        "sample__gumbel",
        "token = (logits + noise).argmax(-1)",
        "token = (2 * logits + noise).argmax(-1)",
        "objective/entropy is 5.7 nats in the first iteration, before any update, where 8 is "
        "healthy; the same SFT model, sampled sharper, writes better answers (gold 3.3, not "
        "1.5). Then the loss trusts log-probs of tokens that are drawn more often than they "
        "say: the KL runs away to 30, and the answers repeat themselves.",
    ),
    Sick(
        "Preferred and rejected responses are exchanged in reward training.",
        "bradley_terry_loss__softplus",
        "rejected_scores - chosen_scores",
        "chosen_scores - rejected_scores",
        "The reward loss falls as it should, yet reward_accuracy is 0.21, well below chance. "
        "Stage 3 does its work: the score rises to 3, the gold reward falls to −9, and the "
        "answers become rude and long.",
    ),
    Sick(
        "The policy is paid for its KL to the reference, not charged for it.",
        "p3o_loss",
        ".detach() - beta * (h[:, 0] - h[:, 1])",
        ".detach() + beta * (h[:, 0] - h[:, 1])",
        "The score rises further than in a healthy run, but the KL does not settle: 6, then "
        "98, 325, 449 nats. The policy ends in one endless answer of entropy near 0, the "
        "furthest from SFT that it could find.",
    ),
    Sick(
        "The worse response of a pair is pushed up.",
        "p3o_loss__signs",
        "return -0.5 * terms.mean(), metrics",
        "return 0.5 * terms.mean(), metrics",
        "The score falls from the first iterations on, and loss/policy, elsewhere near 0, is "
        "−0.5. The KL explodes because the KL term pushes the wrong way, too.",
    ),
    Sick(
        "Ratios are taken against the policy as it is, not as it was when it sampled.",
        "train_policy__helpers",
        "arguments = (new, old[k], ref[k], r[k])",
        "arguments = (new, new.detach(), ref[k], r[k])",
        "policy/ratio is exactly 1, policy/clipfrac and policy/approxkl exactly 0, in all "
        "iterations. The run may end well; on its way nothing stops a step: gradient norms of "
        "150, a KL of 14 in the first iterations.",
    ),
    Sick(
        "r_1 − r_2 does not have size 1 when stage 3 begins.",
        "set_gain__all_at_once",
        "model.score.weight /= rms",
        "model.score.weight *= rms",
        "In the first iteration, where q is r_1 − r_2, objective/q is 3.9, where 0.8 is "
        "healthy: a root mean square of 1 cannot have such a mean. All scores are several "
        "times as large, β is several times too small for them, and the KL ends near 8.",
    ),
    Sick(
        "A response's log-probability is the mean over its tokens, not the sum.",
        "train_policy__helpers",
        "response_logprobs(model, ids, mask).sum(-1)",
        "response_logprobs(model, ids, mask).mean(-1)",
        "objective/entropy starts at 0.2 nats per response, where 8 is healthy, and "
        "objective/kl stays small; kl_policy in output.txt, a sum, is 366. β hardly "
        "costs anything, so the reward model is gamed: score 3.7, gold −3, one endless "
        "answer.",
    ),
    Sick(
        "The reference is the policy itself.",
        "train_policy",
        "ref_logprobs = in_parts(\n            partial(sequence_logprobs, reference)",
        "ref_logprobs = in_parts(\n            partial(sequence_logprobs, policy)",
        "objective/kl is exactly 0 in every iteration; kl_policy in output.txt is 182. "
        "Nothing holds the policy back: the score rises to 3.6, the gold reward falls to −13.",
    ),
    Sick(
        "The scores of a batch are dealt out to other responses.",
        "train_policy__lists",
        "                        r[k],\n",
        "                        r[torch.arange(len(k))],\n",
        "Everything looks alive and nothing is learnt: the score and the gold reward stay "
        "where SFT's are, objective/q stays near 1 instead of falling to 0.2, and the policy "
        "wanders a nat or two.",
    ),
    Sick(
        "The responses of stage 3 are drawn from the reference, not from the policy.",
        "train_policy__lists",
        "ids, mask = sample(policy, chosen",
        "ids, mask = sample(reference, chosen",
        "objective/scores does not move in 80 iterations, though score_policy "
        "has risen: what is scored is SFT's, again and again. objective/kl, the mean of log π "
        "− log π_ref, is negative (to −12), which for samples of π it cannot be.",
    ),
]
