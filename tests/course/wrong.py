"""Wrong solutions of the eight problems: right ones with mistakes that students really make.

Each is a solution of right.py with some of its text replaced. The tests of its problem must refuse
it, and their first message must hold `says`, so that it leads to the mistake.
"""

from typing import NamedTuple


class Wrong(NamedTuple):
    mistake: str
    solution: str
    old: str
    new: str
    says: str


WRONG = [
    # ---- 1
    Wrong(
        "mask from ids != pad",
        "collate__fill",
        "mask[i, len(p) : lengths[i]] = True",
        "mask[i, len(p) :] = ids[i, len(p) :] != model.config.pad_token_id",
        "from ids != pad",
    ),
    Wrong(
        "EOS left out of the mask",
        "collate__fill",
        "mask[i, len(p) : lengths[i]] = True",
        "mask[i, len(p) : lengths[i] - 1] = True",
        "from the first response token to EOS",
    ),
    Wrong(
        "padding on the left",
        "collate__lists",
        "ids.append(p + r + [model.config.pad_token_id] * rest)",
        "ids.append([model.config.pad_token_id] * rest + p + r)",
        "padding belongs on the right",
    ),
    Wrong(
        "the prompt in the mask",
        "collate__pad_twice",
        "torch.zeros(len(p))",
        "torch.ones(len(p))",
        "from the first response token to EOS",
    ),
    # ---- 2
    Wrong(
        "read at the token itself",
        "response_logprobs__gather",
        "hidden[row, column - 1]",
        "hidden[row, column]",
        "one position earlier",
    ),
    Wrong(
        "multiplied by the mask, not selected",
        "response_logprobs__one_hot",
        """    states = model.base_model(tokens)[0][:, :-1][wanted]
    logits = model.get_output_embeddings()(states).float()
    chosen = F.one_hot(tokens[:, 1:][wanted], logits.shape[-1]).float()
    picked = torch.einsum("nv,nv->n", chosen, logits) - logits.logsumexp(-1)
    out = torch.zeros(wanted.shape, device=ids.device)
    out[wanted] = picked
""",
        """    states = model.base_model(tokens)[0][:, :-1]
    logp = model.get_output_embeddings()(states).float().log_softmax(-1)
    out = logp.gather(-1, tokens[:, 1:, None])[..., 0] * wanted
""",
        "select",
    ),
    Wrong(
        "the softmax in bf16",
        "response_logprobs__gather",
        "torch.log_softmax(logits, dim=-1, dtype=torch.float32)",
        "torch.log_softmax(logits, dim=-1).float()",
        "in float32",
    ),
    Wrong(
        "the last token, EOS, forgotten",
        "response_logprobs__rows",
        "where = mask.nonzero()[:, 0].tolist()",
        "where = mask.nonzero()[:-1, 0].tolist()",
        "response token",
    ),
    # ---- 3
    Wrong(
        "the library's default of the 50 likeliest tokens",
        "sample__generate",
        "        top_k=0,\n",
        "        top_k=50,\n",
        "vocabulary",
    ),
    Wrong(
        "another temperature than is scored",
        "sample__without_cache",
        ".float().softmax(-1)",
        ".float().div(0.8).softmax(-1)",
        "frequencies are off",
    ),
    Wrong(
        "pairs tiled: y_1 of all prompts, then y_2",
        "sample__without_cache",
        "rows = [p for p in prompts for _ in range(n)]",
        "rows = prompts * n",
        "follows the wrong prompt",
    ),
    Wrong(
        "positions that count the padding",
        "sample__gumbel",
        "position = (seen.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]",
        "position = torch.arange(seen.shape[1], device=device)[-step.shape[1] :].expand_as(step)",
        "frequencies are off",
    ),
    Wrong(
        "EOS cut off",
        "sample__generate",
        "new = new[: new.index(eos) + 1]",
        "new = new[: new.index(eos)]",
        "EOS",
    ),
    # ---- 4
    Wrong(
        "read at column −1",
        "reward_scores__gather",
        "last = lengths.argmax(-1)",
        "last = lengths[:, -1] * 0 + flat.shape[1] - 1",
        "behind the last response token",
    ),
    Wrong(
        "read one token early",
        "reward_scores__rows",
        "end = mask.nonzero().max().item() + 1",
        "end = mask.nonzero().max().item()",
        "EOS, is not read",
    ),
    Wrong(
        "the mean over the response",
        "reward_scores__rows",
        "last_hidden_state[0, -1]",
        "last_hidden_state[0][mask[:end]].mean(0)",
        "library",
    ),
    # ---- 5
    Wrong(
        "chosen and rejected exchanged",
        "bradley_terry_loss__softplus",
        "rejected_scores - chosen_scores",
        "chosen_scores - rejected_scores",
        "−log σ(chosen − rejected)",
    ),
    Wrong(
        "log of the sigmoid",
        "bradley_terry_loss__classification",
        "F.binary_cross_entropy_with_logits(gap, torch.ones_like(gap))",
        "-torch.log(torch.sigmoid(gap)).mean()",
        "logsigmoid",
    ),
    Wrong(
        "the sum over pairs",
        "bradley_terry_loss__softmax",
        ".mean()",
        ".sum()",
        "the mean of",
    ),
    # ---- 6
    Wrong(
        "log(ρ_1/ρ_2) by division",
        "p3o_loss__two_columns",
        "    u = l1 - l2\n",
        "    u = (l1.exp() / l2.exp()).log()\n",
        "difference of logs",
    ),
    Wrong(
        "q with a gradient",
        "p3o_loss__signs",
        "(logprobs - ref_logprobs).detach() * sign",
        "(logprobs - ref_logprobs) * sign",
        "carry a gradient",
    ),
    Wrong(
        "the KL of the sampling policy",
        "p3o_loss__one_pair_at_a_time",
        "h = (new - ref).detach()",
        "h = (old - ref).detach()",
        "not π_old",
    ),
    Wrong(
        "no importance weight",
        "p3o_loss__two_columns",
        "both = (l1 + l2).exp().detach()",
        "both = torch.ones_like(l1)",
        "ρ_1 ρ_2",
    ),
    Wrong(
        "scores whitened",
        "p3o_loss__two_columns",
        "q = (scores[:, 0] - scores[:, 1]) - beta",
        "scores = (scores - scores.mean()) / (scores.std() + 1e-8)\n"
        "        q = (scores[:, 0] - scores[:, 1]) - beta",
        "whitening",
    ),
    # ---- 7
    Wrong(
        "from the spread of all scores",
        "set_gain__all_at_once",
        "gaps = reward_scores(model, ids, mask).diff()",
        "gaps = reward_scores(model, ids, mask)\n    gaps = gaps - gaps.mean()",
        "root mean square 1",
    ),
    Wrong(
        "returns the size, not the factor",
        "set_gain__all_at_once",
        "return 1 / rms",
        "return rms",
        "root mean square 1",
    ),
    Wrong(
        "multiplied where it should be divided",
        "set_gain__all_at_once",
        "model.score.weight /= rms",
        "model.score.weight *= rms",
        "the factor that is returned",
    ),
    Wrong(
        "the differences' mean size, not their root mean square",
        "set_gain__one_by_one",
        "squares += (r[0, 0].double() - r[0, 1].double()).item() ** 2",
        "squares += abs((r[0, 0].double() - r[0, 1].double()).item())",
        "root mean square 1",
    ),
    # ---- 8
    Wrong(
        "the mean over tokens on one side of the ratio",
        "train_policy__lists",
        "new = response_logprobs(policy, ids[k], mask[k]).sum(-1)",
        "new = response_logprobs(policy, ids[k], mask[k]).mean(-1)",
        "ratio = 1",
    ),
    Wrong(
        "scores in another order than the log-probs",
        "train_policy__lists",
        "                        r[k],\n",
        "                        r[torch.arange(len(k))],\n",
        "pairs' scores",
    ),
    Wrong(
        "π_old computed anew at every update",
        "train_policy__helpers",
        "arguments = (new, old[k], ref[k], r[k])",
        "arguments = (new, new.detach(), ref[k], r[k])",
        "π_old",
    ),
    Wrong(
        "dropout left on",
        "train_policy__helpers",
        "policy.train(False)",
        "policy.train(True)",
        "ratio = 1",
    ),
    Wrong(
        "pairs torn: rows shuffled, not pairs",
        "train_policy__by_dataset",
        "data = torch.utils.data.TensorDataset(ids, mask, *columns.values())",
        "columns['score'] = columns['score'].flatten()[torch.randperm(2 * len(ids))].view(-1, 2)\n"
        "        data = torch.utils.data.TensorDataset(ids, mask, *columns.values())",
        "torn",
    ),
    Wrong(
        "gradients of micro-batches not averaged",
        "train_policy__by_dataset",
        "loss.mul(len(i) / count).backward()",
        "loss.backward()",
        "micro-batch",
    ),
]
