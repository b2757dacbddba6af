"""Wrong solutions of the eight problems: right ones with a mistake that students really make.

An entry of WRONG is the mistake, a solution in right.py or p3o.py, words that the first message of
the problem's tests must hold (>), and the lines of the solution that are replaced (-, +). SICK
chooses mistakes for the bug hunt: a run with one of them ends without an error, but its metrics
show what is wrong. Figures are ranges over seeds 0 to 2 of `p3o.py --small`, because another machine
rounds differently and gives other ones. In a healthy run stage 3 starts at an entropy of 8 nats and
a length of 15 to 17, and ends at a KL of 2 to 4 and a win rate of 0.9.
"""
# ruff: noqa: E501

from typing import NamedTuple

from bugs import entries


class Wrong(NamedTuple):
    mistake: str
    solution: str
    says: str
    old: str
    new: str

    @property
    def problem(self) -> str:
        return self.solution.split("__")[0]


class Sick(NamedTuple):
    wrong: Wrong
    diagnosis: str  # what students choose from
    symptom: str  # for the instructor


WRONG = []
for mistake, (solution, says), old, new in entries(r"""
# mask from ids != pad
  collate__fill
> from ids != pad
-mask[i, len(p) : lengths[i]] = True
+mask[i, len(p) :] = ids[i, len(p) :] != model.config.pad_token_id
# EOS left out of the mask
  collate__fill
> from the first response token to EOS
-mask[i, len(p) : lengths[i]] = True
+mask[i, len(p) : lengths[i] - 1] = True
# padding on the left
  collate__lists
> padding belongs on the right
-ids.append(p + r + [model.config.pad_token_id] * rest)
+ids.append([model.config.pad_token_id] * rest + p + r)
# the prompt in the mask
  collate__pad_twice
> from the first response token to EOS
-torch.zeros(len(p))
+torch.ones(len(p))
# a mask of integers
  collate__fill
> boolean
-dtype=torch.bool
+dtype=torch.long
# log-probs read at the token itself
  response_logprobs__gather
> one position earlier
-hidden[row, column - 1]
+hidden[row, column]
# multiplied by the mask instead of selected
  response_logprobs__one_hot
> select
-    states = model.base_model(tokens)[0][:, :-1][wanted]
-    logits = model.get_output_embeddings()(states).float()
-    chosen = F.one_hot(tokens[:, 1:][wanted], logits.shape[-1]).float()
-    picked = torch.einsum("nv,nv->n", chosen, logits) - logits.logsumexp(-1)
-    out = torch.zeros(wanted.shape, device=ids.device)
-    out[wanted] = picked
+    states = model.base_model(tokens)[0][:, :-1]
+    logp = model.get_output_embeddings()(states).float().log_softmax(-1)
+    out = logp.gather(-1, tokens[:, 1:, None])[..., 0] * wanted
# the softmax in bf16
  response_logprobs__gather
> in float32
-torch.log_softmax(logits, dim=-1, dtype=torch.float32)
+torch.log_softmax(logits, dim=-1).float()
# the last token, EOS, forgotten
  response_logprobs__rows
> response token
-where = mask.nonzero()[:, 0].tolist()
+where = mask.nonzero()[:-1, 0].tolist()
# the library's default: only the 50 likeliest tokens
  sample__generate
> vocabulary
-        top_k=0,
+        top_k=50,
# sampled at a lower temperature than scored
  sample__without_cache
> frequencies are off
-.float().softmax(-1)
+.float().div(0.8).softmax(-1)
# sampled twice as sharply as scored
  sample__gumbel
> frequencies are off
-token = (logits + noise).argmax(-1)
+token = (2 * logits + noise).argmax(-1)
# only the likeliest nine tenths
  sample__generate
> top-p
-        top_p=1.0,
+        top_p=0.9,
# a drawn pad token left out of the mask
  sample__gumbel
> drawn pad token
-kept.append(~done)
+kept.append(~done & (token != pad))
# pairs tiled: y_1 of all prompts, then y_2
  sample__without_cache
> follows the wrong prompt
-rows = [p for p in prompts for _ in range(n)]
+rows = prompts * n
# positions that count the padding
  sample__gumbel
> frequencies are off
-position = (seen.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
+position = torch.arange(seen.shape[1], device=device)[-step.shape[1] :].expand_as(step)
# EOS cut off
  sample__generate
> EOS
-new = new[: new.index(eos) + 1]
+new = new[: new.index(eos)]
# tokens after EOS counted as response
  sample
> EOS
-[i for i, token in enumerate(drawn) if token != model.config.eos_token_id]
+list(range(len(drawn)))
# score read at column −1
  reward_scores__gather
> behind the last response token
-last = lengths.argmax(-1)
+last = lengths[:, -1] * 0 + flat.shape[1] - 1
# score read one token early
  reward_scores__rows
> EOS, is not read
-end = mask.nonzero().max().item() + 1
+end = mask.nonzero().max().item()
# the mean over the response
  reward_scores__rows
> library
-last_hidden_state[0, -1]
+last_hidden_state[0][mask[:end]].mean(0)
# chosen and rejected exchanged
  bradley_terry_loss__softplus
> −log σ(chosen − rejected)
-rejected_scores - chosen_scores
+chosen_scores - rejected_scores
# log of the sigmoid
  bradley_terry_loss__classification
> underflows
-F.binary_cross_entropy_with_logits(gap, torch.ones_like(gap))
+-torch.log(torch.sigmoid(gap)).mean()
# the sum over pairs
  bradley_terry_loss__softmax
> the mean of
-.mean()
+.sum()
# log(ρ_1/ρ_2) by division
  p3o_loss__two_columns
> difference of logs
-    u = l1 - l2
+    u = (l1.exp() / l2.exp()).log()
# q with a gradient
  p3o_loss__signs
> carry a gradient
-(logprobs - ref_logprobs).detach() * sign
+(logprobs - ref_logprobs) * sign
# the KL of the sampling policy
  p3o_loss__one_response_at_a_time
> h is π_old's, but should be π's
-h = (logprobs - ref_logprobs).detach()
+h = (old_logprobs - ref_logprobs).detach()
# the KL of the wrong sign
  p3o_loss
> wrong sign
-.detach() - beta * (h[:, 0] - h[:, 1])
+.detach() + beta * (h[:, 0] - h[:, 1])
# L minimised instead of −L
  p3o_loss__signs
> in the gradient ½
-return -0.5 * terms.mean(), metrics
+return 0.5 * terms.mean(), metrics
# no importance weight
  p3o_loss__two_columns
> ρ_1 ρ_2
-both = (l1 + l2).exp().detach()
+both = torch.ones_like(l1)
# no clip in V2
  p3o_loss__two_columns
> clip by ε is missing
-        objective = 0.5 * torch.min(a, b)
+        objective = 0.5 * a
# no bound on V2's weight
  p3o_loss__two_columns
> c is missing
-        w = both.clamp(1 / ratio_bound, ratio_bound)
+        w = both
# no bound on V1's weights
  p3o_loss__one_response_at_a_time
> c is missing
-push = push * other.clip(1 / ratio_bound, ratio_bound)
+push = push * other
# V1: its own ratio as weight
  p3o_loss__signs
> own ρ̄, not its partner's
-bounded[:, [1, 0]]
+bounded
# V1: the partner's weight with a gradient
  p3o_loss__signs
> carry a gradient
-bounded = ratio.detach().clamp(1 / ratio_bound, ratio_bound)
+bounded = ratio.clamp(1 / ratio_bound, ratio_bound)
# the weight bounded where nothing is clipped
  p3o_loss__one_response_at_a_time
> has a bound
-        push = q * torch.exp(moved.detach().sum(1))
-        u = cut
+        push = q * torch.exp(moved.detach().sum(1)).clip(1 / ratio_bound, ratio_bound)
+        u = cut
# V2: the weight with a gradient
  p3o_loss__two_columns
> carries no gradient
-both = (l1 + l2).exp().detach()
+both = (l1 + l2).exp()
# scores whitened
  p3o_loss__two_columns
> whitening
-        q = (scores[:, 0] - scores[:, 1]) - beta
+        scores = (scores - scores.mean()) / (scores.std() + 1e-8)
+        q = (scores[:, 0] - scores[:, 1]) - beta
# the gain from the spread of all scores
  set_gain__all_at_once
> root mean square 1
-gaps = reward_scores(model, ids, mask).diff()
+gaps = reward_scores(model, ids, mask)
+    gaps = gaps - gaps.mean()
# the size returned, not the factor
  set_gain__all_at_once
> root mean square 1
-return 1 / rms
+return rms
# multiplied by the size, not divided
  set_gain__all_at_once
> the factor that is returned
-model.score.weight /= rms
+model.score.weight *= rms
# the differences' mean size, not their root mean square
  set_gain__one_by_one
> root mean square 1
-squares += (r[0, 0].double() - r[0, 1].double()).item() ** 2
+squares += abs((r[0, 0].double() - r[0, 1].double()).item())
# the mean over tokens on one side of the ratio
  train_policy__lists
> ratio = 1
-new = response_logprobs(policy, ids[k], mask[k]).sum(-1)
+new = response_logprobs(policy, ids[k], mask[k]).mean(-1)
# the mean over tokens everywhere
  train_policy__helpers
> belong
-response_logprobs(model, ids, mask).sum(-1)
+response_logprobs(model, ids, mask).mean(-1)
# scores in another order than the log-probs
  train_policy__lists
> pairs' scores
-                        r[k],
+                        r[torch.arange(len(k))],
# no self-check
  train_policy__lists
> self_check
-                        self_check("ratio = 1 and KL = 0 before the first update", drift < 1e-3)
+                        pass
# samples from the reference
  train_policy__lists
> references_log_probs
-ids, mask = sample(policy, chosen
+ids, mask = sample(reference, chosen
# the policy as its own reference
  train_policy
> reference_is_another_model
-sequence_logprobs(reference, *part)
+sequence_logprobs(policy, *part)
# π_old computed anew at every update
  train_policy__helpers
> π_old
-arguments = (new, old[k], ref[k], r[k])
+arguments = (new, new.detach(), ref[k], r[k])
# dropout left on
  train_policy__helpers
> ratio = 1
-policy.train(False)
+policy.train(True)
# pairs torn: rows shuffled, not pairs
  train_policy__by_dataset
> torn
-data = torch.utils.data.TensorDataset(ids, mask, *columns.values())
+columns['score'] = columns['score'].flatten()[torch.randperm(2 * len(ids))].view(-1, 2)
+        data = torch.utils.data.TensorDataset(ids, mask, *columns.values())
# gradients of micro-batches not averaged
  train_policy__by_dataset
> micro-batch
-loss.mul(len(i) / count).backward()
+loss.backward()
"""):
    WRONG.append(Wrong(mistake, solution, says, old, new))

SICK = []
for mistake, (diagnosis, *symptom), _, _ in entries("""
# EOS left out of the mask
  The token that ends a response is not counted as part of it.
  The model never learns to stop. finished_sft is 0 although the SFT loss is fine. Every response
  reaches its limit, and answers run on after they are complete. The later stages work as well as
  they can: the score rises and the KL settles.
# the prompt in the mask
  The prompt is counted as part of the response.
  The answers in output.txt begin with the question. From the first iteration on, responses are ten
  tokens longer than the data's, and their entropy is 13 to 14 (healthy: 8). The KL falls back to
  about 0, or below, because the policy also moves on tokens that it did not sample.
# log-probs read at the token itself
  Log-probabilities are read where the model has already seen the token.
  Too good to be true: the SFT loss falls to 0.00 (healthy: 0.5), because the model only has to
  repeat what it reads. Its samples are no language and never end.
# tokens after EOS counted as response
  Tokens sampled after the end of a response are counted as part of it.
  Stages 1 and 2 are healthy. But from the first iteration on, every response has 40 tokens, its
  limit (healthy: 15), although all of them hold an EOS (response/finished is 1). Answers start
  anew after they are complete.
# sampled twice as sharply as scored
  Responses are sampled at another temperature than they are scored at.
  objective/entropy is below 6 nats in the first iteration, before any update (healthy: 8). The same
  SFT model, sampled more sharply, writes better answers (gold_sft above 3, not below 2). But the
  loss trusts log-probs that are too low for how often tokens come. The KL ends at 5 to 30.
# chosen and rejected exchanged
  Preferred and rejected responses are exchanged in reward training.
  The reward loss falls as it should, but reward_accuracy is near 0.2, far below chance. Stage 3
  does its work: the score rises by 2 or more, the gold reward falls to −6 or less, and answers
  become rude and long.
# the KL of the wrong sign
  The policy is paid for its KL to the reference, not charged for it.
  The KL does not settle. It passes 90 nats within 20 iterations and ends above 400. At first the
  score rises as in a healthy run. The policy ends in endless answers, far away from SFT.
# L minimised instead of −L
  The worse response of a pair is pushed up.
  The score falls from the first iterations on. loss/policy reaches −0.5 or less (healthy: within
  0.1 of 0). The KL explodes to hundreds of nats, because the KL term pushes the wrong way too.
# π_old computed anew at every update
  Ratios are taken against the policy as it is, not as it was when it sampled.
  In all iterations policy/ratio is exactly 1, and policy/clipfrac and policy/approxkl are exactly 0.
  The run may end well. But on its way nothing stops a step: there are gradient norms of 30 to above
  100 (healthy: below 20), and a KL of 9 to 17 in the first iterations.
# multiplied by the size, not divided
  r_1 − r_2 does not have size 1 when stage 3 begins.
  In the first iteration q is r_1 − r_2, and objective/q is 3.9 to 5 (healthy: 0.8). A root mean
  square of 1 cannot have such a mean. All scores are several times too large, so β is several times too
  small for them, and the KL ends at 8 to 60.
# the mean over tokens everywhere
  A response's log-probability is the mean over its tokens, not the sum.
  objective/entropy starts at 0.2 nats per response (healthy: 8), and objective/kl stays small. But
  kl_policy in output.txt, which is a sum, is 90 to 370. KL costs almost nothing, so the policy
  games the reward model: the score rises by 3 or more, gold is −3 or far less, answers are endless.
# the policy as its own reference
  The reference is the policy itself.
  objective/kl is exactly 0 in every iteration, but kl_policy in output.txt is 70 to 180. Nothing
  holds the policy back: the score rises by 2 or more, and the gold reward falls below −10.
# scores in another order than the log-probs
  The scores of a batch are given to other responses.
  All metrics move, but the policy learns nothing. The score and the gold reward stay where SFT's
  are. objective/q stays at 0.7 to 1 instead of falling to 0.2, and the KL wanders.
# samples from the reference
  The responses of stage 3 are sampled from the reference, not from the policy.
  objective/scores does not move in 80 iterations, although score_policy has risen: stage 3 scores
  SFT's samples again and again. objective/kl, the mean of log π − log π_ref, is negative (to about −10, or lower).
  For samples of π it cannot be.
"""):
    (found,) = [wrong for wrong in WRONG if wrong.mistake == mistake]
    SICK.append(Sick(found, diagnosis, " ".join(symptom)))
