"""A catalogue of bugs that RLHF code really has, each planted in p3o.py by replacing one or two lines.

`old` occurs exactly once in p3o.py; `caught_by` is a test that fails with the bug and whose message leads to it.
"""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    old: str
    new: str
    caught_by: str


CLIP = (
    '    norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0).item()\n'
)

BUGS = [
    # ---- data
    Bug(
        "split at the first Assistant turn, not at the last shared one",
        "cut = shared.rfind(ASSISTANT)",
        "cut = shared.find(ASSISTANT)",
        "test_a_row_is_split_after_the_last_assistant_turn_that_both_share",
    ),
    Bug(
        "split each dialogue at its own last turn",
        "cut = shared.rfind(ASSISTANT) + len(ASSISTANT) if ASSISTANT in shared else 0",
        "cut = chosen.rfind(ASSISTANT) + len(ASSISTANT) if ASSISTANT in shared else 0",
        "test_rows_that_cannot_be_used_are_dropped_with_their_reason",
    ),
    Bug(
        "hold out rows, not prompts",
        "train = [pair for pair in train if zlib.crc32(pair.prompt.encode()) % 10 != 0]",
        "heldout, train = heldout[::2], [pair for pair in train if pair not in heldout[::2]]",
        "test_a_single_file_holds_out_whole_prompts",
    ),
    Bug(
        "one side of a row with a second question kept",
        "HUMAN in chosen + rejected",
        "HUMAN in chosen",
        "test_rows_that_cannot_be_used_are_dropped_with_their_reason",
    ),
    Bug(
        "long prompts lose the middle of a turn first",
        "while len(ids) > cfg.prompt_tokens and HUMAN in prompt[1:]:",
        "while False:",
        "test_a_long_prompt_loses_whole_turns_then_the_beginning_of_its_last",
    ),
    Bug(
        "prompts cut at the end",
        "ids[-cfg.prompt_tokens :]",
        "ids[: cfg.prompt_tokens]",
        "test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos",
    ),
    Bug(
        "EOS forged after a response that was cut",
        '[*encode(text)["input_ids"], tokenizer.eos_token_id][: cfg.response_tokens]',
        '[*encode(text)["input_ids"][: cfg.response_tokens - 1], tokenizer.eos_token_id]',
        "test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos",
    ),
    Bug(
        "no EOS in the training data",
        '[*encode(text)["input_ids"], tokenizer.eos_token_id][: cfg.response_tokens]',
        'encode(text)["input_ids"][: cfg.response_tokens]',
        "test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos",
    ),
    # ---- masks
    Bug(
        "mask one token short: EOS excluded",
        "(torch.arange(ids.shape[1]) < end)",
        "(torch.arange(ids.shape[1]) < end - 1)",
        "test_the_mask_covers_the_response_and_its_eos_and_nothing_else",
    ),
    Bug(
        "mask begins at the last prompt token",
        "(torch.arange(ids.shape[1]) >= start)",
        "(torch.arange(ids.shape[1]) >= start - 1)",
        "test_the_mask_covers_the_response_and_its_eos_and_nothing_else",
    ),
    Bug(
        "mask from ids, not positions: hides EOS where it is the padding",
        "& (torch.arange(ids.shape[1]) < end)",
        "& (ids != model.config.pad_token_id)",
        "test_the_mask_keeps_eos_where_eos_is_the_padding_too",
    ),
    # ---- sampling
    Bug(
        "only the 50 likeliest tokens sampled",
        "logits.float().softmax(-1)",
        "logits.where(logits >= logits.topk(50).values[:, -1:], -math.inf).float().softmax(-1)",
        "test_the_whole_vocabulary_is_sampled",
    ),
    Bug(
        "sampled at another temperature than scored",
        "cdf = logits.float().softmax(-1)",
        "cdf = (logits.float() / 0.8).softmax(-1)",
        "test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt",
    ),
    Bug(
        "padding of short prompts not masked",
        "attention_mask=(columns >= left).long()",
        "attention_mask=(columns >= 0 * left).long()",
        "test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt",
    ),
    Bug(
        "positions count the padding",
        "positions = (columns - left).clamp(min=0)[:, -unread.shape[1] :]",
        "positions = columns.expand(len(rows), -1)[:, -unread.shape[1] :]",
        "test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt",
    ),
    Bug(
        "pairs interleaved wrongly",
        "return ids.view(len(prompts), n, -1), response_mask",
        "return ids.view(n, len(prompts), -1).transpose(0, 1), response_mask",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "padding of another row removed",
        "+ left) % ids.shape[1]",
        "+ left.flip(0)) % ids.shape[1]",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "sampled EOS left out of the mask",
        "torch.cat([response_mask, unfinished], 1)",
        "torch.cat([response_mask, unfinished & (unread != eos)], 1)",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "everything after EOS counts as response",
        "torch.cat([response_mask, unfinished], 1)",
        "torch.cat([response_mask, torch.ones_like(unfinished)], 1)",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "both responses of a pair from the same random numbers",
        "torch.rand_like(cdf[:, :1])",
        "torch.rand_like(cdf[::n, :1]).repeat_interleave(n, 0)",
        "test_the_two_responses_of_a_pair_are_independent",
    ),
    # ---- log-probabilities and scores
    Bug(
        "log-probs read at the token itself",
        "hidden = model.base_model(flat).last_hidden_state[:, :-1]",
        "hidden = model.base_model(flat).last_hidden_state[:, 1:]",
        "test_a_response_tokens_log_prob_is_read_one_position_earlier",
    ),
    Bug(
        "softmax in the model's precision",
        "logits = model.get_output_embeddings()(hidden[predicted]).float()",
        "logits = model.get_output_embeddings()(hidden[predicted])",
        "test_log_probs_are_computed_in_float32_even_in_a_bfloat16_model",
    ),
    Bug(
        "masked by multiplication: NaN · 0 is NaN",
        "logprobs = torch.zeros(predicted.shape, device=ids.device).masked_scatter(predicted, picked)",
        "every = model.get_output_embeddings()(hidden).float().log_softmax(-1).gather(-1, flat[:, 1:, None])[..., 0]\n"
        "    logprobs = every * predicted",
        "test_positions_outside_the_response_are_left_out_not_multiplied_by_zero",
    ),
    Bug(
        "score read one token early",
        "last = (positions * response_mask.flatten(0, -2)).argmax(-1, keepdim=True)",
        "last = (positions * response_mask.flatten(0, -2)).argmax(-1, keepdim=True) - 1",
        "test_a_score_is_read_at_the_last_response_token",
    ),
    Bug(
        "score read at the end of the row, padding or not",
        "hidden.take_along_dim(last[..., None], 1)",
        "hidden[:, -1:]",
        "test_a_score_is_the_same_alone_and_in_a_padded_batch",
    ),
    # ---- the losses
    Bug(
        "log of the sigmoid instead of logsigmoid",
        "return -F.logsigmoid(chosen_scores - rejected_scores).mean()",
        "return -torch.log(torch.sigmoid(chosen_scores - rejected_scores)).mean()",
        "test_bradley_terry_loss_and_gradient_are_finite_at_any_margin",
    ),
    Bug(
        "chosen and rejected swapped",
        "F.logsigmoid(chosen_scores - rejected_scores)",
        "F.logsigmoid(rejected_scores - chosen_scores)",
        "test_bradley_terry_loss_is_the_mean_of_minus_log_sigmoid_of_chosen_minus_rejected",
    ),
    Bug(
        "detach missing on q",
        "h = (logprobs - ref_logprobs).detach()",
        "h = logprobs - ref_logprobs.detach()",
        "test_the_gradient_agrees_with_finite_differences_of_the_objective_with_its_weights_held",
    ),
    Bug(
        "KL from the rollout policy",
        "h = (logprobs - ref_logprobs).detach()",
        "h = (old_logprobs - ref_logprobs).detach()",
        "test_unclipped_the_expected_update_is_the_gradient_of_reward_minus_beta_kl_at_every_policy",
    ),
    Bug(
        "KL of the wrong sign",
        ".detach() - beta * (h[:, 0] - h[:, 1])",
        ".detach() + beta * (h[:, 0] - h[:, 1])",
        "test_no_pair_is_pushed_exactly_at_the_known_optimum",
    ),
    Bug(
        "½ lost",
        "objective = 0.5 * torch.minimum(free, held).sum(-1)",
        "objective = torch.minimum(free, held).sum(-1)",
        "test_rloo_with_two_samples_is_p3o_at_the_first_inner_step",
    ),
    Bug(
        "max for min",
        "0.5 * torch.minimum(free, held).sum(-1)",
        "0.5 * torch.maximum(free, held).sum(-1)",
        "test_the_gradient_is_zero_exactly_where_the_clip_stops_it",
    ),
    Bug(
        "min and max swapped on the negative side only",
        "0.5 * torch.minimum(free, held).sum(-1)",
        "0.5 * torch.where(q[:, None] > 0, torch.minimum(free, held), torch.maximum(free, held)).sum(-1)",
        "test_the_gradient_is_zero_exactly_where_the_clip_stops_it",
    ),
    Bug(
        "V1: ratio clipped but not its partner's weight",
        "ratio.detach().clamp(1 / ratio_bound, ratio_bound).flip(-1)",
        "ratio.detach().flip(-1)",
        "test_v1_bounds_the_partners_weight_by_c_and_gives_it_no_gradient",
    ),
    Bug(
        "V1: own ratio as weight, not the partner's",
        "ratio.detach().clamp(1 / ratio_bound, ratio_bound).flip(-1)",
        "ratio.detach().clamp(1 / ratio_bound, ratio_bound)",
        "test_unclipped_both_variants_are_the_pairwise_policy_gradient_of_each_sample_at_every_policy",
    ),
    Bug(
        "V1: the partner's weight carries a gradient",
        "ratio.detach().clamp(1 / ratio_bound, ratio_bound).flip(-1)",
        "ratio.clamp(1 / ratio_bound, ratio_bound).flip(-1)",
        "test_at_the_sampling_policy_every_variant_is_half_q_times_G",
    ),
    Bug(
        "V1: only the upper side clipped",
        "ratio.clamp(1 - clip_range, 1 + clip_range)",
        "ratio.clamp(max=1 + clip_range)",
        "test_the_gradient_is_zero_exactly_where_the_clip_stops_it",
    ),
    Bug(
        "V2: the weight carries a gradient",
        "product = log_ratio.sum(-1).exp().detach()",
        "product = log_ratio.sum(-1).exp()",
        "test_unclipped_both_variants_are_the_pairwise_policy_gradient_of_each_sample_at_every_policy",
    ),
    Bug(
        "V2: the weight has no bound",
        "weight = product.clamp(1 / ratio_bound, ratio_bound)",
        "weight = product",
        "test_a_drift_of_both_responses_is_not_clipped_by_v2_only_bounded_by_c",
    ),
    Bug(
        "no importance weight",
        "product = log_ratio.sum(-1).exp().detach()",
        "product = torch.ones_like(u)",
        "test_the_pairwise_policy_gradient_is_the_policy_gradient_on_and_off_policy",
    ),
    Bug(
        "ratio against the current policy: always 1",
        "log_ratio = logprobs - old_logprobs.detach()",
        "log_ratio = logprobs - logprobs.detach()",
        "test_the_loss_is_minus_the_mean_objective_of_the_equations",
    ),
    Bug(
        "scores whitened",
        "    q = (scores[:, 0] - scores[:, 1]).detach() - beta",
        "    scores = (scores - scores.mean()) / scores.std()\n    q = (scores[:, 0] - scores[:, 1]).detach() - beta",
        "test_p3o_gives_equivalent_rewards_the_same_update_sample_by_sample",
    ),
    Bug(
        "scores clipped to ±10",
        "q = (scores[:, 0] - scores[:, 1]).detach() - beta",
        "q = (scores[:, 0].clamp(-10, 10) - scores[:, 1].clamp(-10, 10)).detach() - beta",
        "test_p3o_gives_equivalent_rewards_the_same_update_sample_by_sample",
    ),
    Bug(
        "sum over pairs for mean",
        "return -objective.mean(), metrics",
        "return -objective.sum(), metrics",
        "test_equal_micro_batches_average_to_the_full_batchs_gradient",
    ),
    # ---- the stages
    Bug(
        "updated before the gradient is clipped",
        CLIP,
        "    optimizer.step()\n" + CLIP,
        "test_a_step_clips_the_gradient_to_norm_1_and_reports_its_norm_before",
    ),
    Bug(
        "gradients pile up",
        "    optimizer.zero_grad()\n",
        "",
        "test_a_step_forgets_the_gradient_of_the_step_before",
    ),
    Bug(
        "SFT on the rejected responses",
        "prompts, chosen, _ = zip(*rows, strict=True)",
        "prompts, _, chosen = zip(*rows, strict=True)",
        "test_the_sft_loss_is_the_mean_over_the_tokens_of_the_chosen_responses",
    ),
    Bug(
        "SFT loss averaged over padding",
        "loss = -response_logprobs(policy, *part).sum() / response_mask.sum()",
        "loss = -response_logprobs(policy, *part).sum() / response_mask[:, 1:].numel()",
        "test_the_sft_loss_is_the_mean_over_the_tokens_of_the_chosen_responses",
    ),
    Bug(
        "dropout on while the policy trains",
        "    policy.eval()\n    options = ",
        "    policy.train()\n    options = ",
        "test_every_stage_turns_dropout_off",
    ),
    Bug(
        "dropout on while the reward model trains",
        "    model.eval()\n    torch.nn.init.zeros_",
        "    model.train()\n    torch.nn.init.zeros_",
        "test_every_stage_turns_dropout_off",
    ),
    Bug(
        "a reward head that starts anywhere",
        "torch.nn.init.zeros_(model.score.weight)",
        "torch.nn.init.normal_(model.score.weight)",
        "test_reward_training_starts_at_ln_2_and_learns_to_rank",
    ),
    Bug(
        "gain from absolute scores",
        "size = scores.diff().square().mean().sqrt().item()",
        "size = scores.std().item()",
        "test_the_gain_does_not_depend_on_an_offset_of_the_reward",
    ),
    Bug(
        "KL to the sampling policy, not to the reference",
        "partial(response_logprobs, reference), size",
        "partial(response_logprobs, policy), size",
        "test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference",
    ),
    Bug(
        "the reference is the policy: it learns",
        'policy, reference, reward_model = load(cfg, "sft"), load(cfg, "sft"), load(cfg, "reward")',
        'policy, reward_model = load(cfg, "sft"), load(cfg, "reward")\n        reference = policy',
        "test_a_run_leaves_models_metrics_and_a_summary",
    ),
    Bug(
        "mean over tokens on one side of the ratio",
        "logprobs = response_logprobs(policy, ids[pairs], response_mask[pairs]).sum(-1)",
        "logprobs = response_logprobs(policy, ids[pairs], response_mask[pairs]).mean(-1)",
        "test_with_no_learning_rate_ratio_is_1_and_kl_0_at_every_inner_step",
    ),
    Bug(
        "shuffled log-probs with unshuffled scores",
        "loss_fn(logprobs, old, ref, scores[pairs], **options)",
        "loss_fn(logprobs, old, ref, scores[: len(pairs)], **options)",
        "test_score_and_log_probs_of_a_pair_belong_together",
    ),
    Bug(
        "pairs torn by shuffling rows",
        "loss_fn(logprobs, old, ref, scores[pairs], **options)",
        "loss_fn(logprobs, old, ref, scores[pairs].flatten()[torch.randperm(2 * len(pairs))].view(-1, 2), **options)",
        "test_pairs_stay_together_from_sampling_to_loss",
    ),
    Bug(
        "reported KL of the wrong sign",
        '"objective/kl": (old_logprobs - ref_logprobs).mean().item()',
        '"objective/kl": (ref_logprobs - old_logprobs).mean().item()',
        "test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference",
    ),
    Bug(
        "reward head neither clipped nor counted in the norm",
        '[p for g in optimizer.param_groups for p in g["params"]]',
        'optimizer.param_groups[0]["params"]',
        "test_a_step_clips_the_norm_over_all_parameter_groups",
    ),
    Bug(
        "micro-batches count alike, whatever their size",
        "(loss * len(pairs) / len(minibatch)).backward()",
        "(loss * cfg.micro_batch / cfg.minibatch).backward()",
        "test_micro_batches_change_memory_and_not_the_update",
    ),
    Bug(
        "an update for each micro-batch",
        """                norm = gradient_step(optimizer, schedule)
                sums["policy/grad_norm"] += norm * len(minibatch)""",
        """                    norm = gradient_step(optimizer, schedule)
                    sums["policy/grad_norm"] += norm * len(pairs)""",
        "test_micro_batches_change_memory_and_not_the_update",
    ),
    Bug(
        "schedule of one pass, training of several",
        "optimizer, schedule = make_optimizer(groups, len(batches))",
        "optimizer, schedule = make_optimizer(groups, len(batches) // cfg.epochs)",
        "test_every_stages_learning_rate_falls_to_zero_at_its_last_update_and_not_before",
    ),
    Bug(
        "rows never shuffled",
        "torch.randperm(len(rows))",
        "torch.arange(len(rows))",
        "test_every_stage_sees_each_row_once_a_pass_in_a_new_order",
    ),
    Bug(
        "interval too narrow: deviation / n",
        "1.96 * values.std().item() / math.sqrt(len(values))",
        "1.96 * values.std().item() / len(values)",
        "test_evaluation_by_hand",
    ),
    Bug(
        "weight decay pulls the policy away from the reference",
        '{"params": policy.parameters(), "lr": cfg.lr, "weight_decay": 0.0}',
        '{"params": policy.parameters(), "lr": cfg.lr}',
        "test_a_loss_without_gradient_leaves_the_policy_where_it_is",
    ),
    Bug(
        "stages draw from whatever the generator holds",
        '    torch.manual_seed(zlib.crc32(f"{cfg.seed} {name}".encode()))\n',
        "",
        "test_two_runs_with_one_seed_are_identical_and_another_seed_is_not",
    ),
    Bug(
        "a tie counts as a win",
        "(policy > sft) + 0.5 * (policy == sft)",
        "float(policy >= sft)",
        "test_evaluation_by_hand",
    ),
    Bug(
        "a checkpoint without AdamW's moments",
        "learner = (policy, optimizer, schedule)",
        "learner = (policy, schedule)",
        "test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights",
    ),
    Bug(
        "a checkpoint whose random generator is not put back",
        "        torch.set_rng_state(cpu)\n",
        "",
        "test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights",
    ),
    Bug(
        "a killed run's metrics stay and come twice",
        """before = kept.pop().partition(f'{{"stage": "{name}", "step": {step},')[0]""",
        "before = kept.pop()",
        "test_killed_in_any_stage_the_same_command_ends_in_the_same_weights",
    ),
    # ---- the run around the method
    Bug(
        "a failed self-check prints and goes on",
        '    assert holds, f"check failed: {claim}"\n',
        "",
        "test_a_failed_self_check_stops_the_run",
    ),
    Bug(
        "an interval computed from --eval-prompts where fewer prompts were held out",
        "1.96 * values.std().item() / math.sqrt(len(values))",
        "1.96 * values.std().item() / math.sqrt(cfg.eval_prompts)",
        "test_an_interval_counts_the_prompts_that_there_are",
    ),
    Bug(
        "a folder published half-written after an error",
        """    for write in writers:
        write(scratch)
    scratch.replace(path)""",
        """    try:
        for write in writers:
            write(scratch)
    finally:
        scratch.replace(path)""",
        "test_what_is_written_appears_whole_or_not_at_all",
    ),
    Bug(
        "--iterations not compared on resuming",
        '("out", "micro_batch", "eval_prompts")',
        '("out", "micro_batch", "eval_prompts", "iterations")',
        "test_what_changes_the_training_is_compared_when_a_run_goes_on",
    ),
    Bug(
        "the models of stages 2 and 3 loaded in bf16",
        "Path(cfg.out) / name, dtype=torch.float32, **head",
        "Path(cfg.out) / name, dtype=torch.bfloat16, **head",
        "test_every_stage_starts_from_weights_in_float32",
    ),
    Bug(
        "the reward model saved before its gain",
        """        gain = set_gain(reward_model, load(cfg, "sft"), prompts[:512], cfg)
        print(f"  gain: scores × {gain:.3f}, so that r_1 − r_2 has root mean square 1 on SFT's pairs")
        write_atomically(out / "reward", reward_model.save_pretrained, tokenizer.save_pretrained)
""",
        """        write_atomically(out / "reward", reward_model.save_pretrained, tokenizer.save_pretrained)
        gain = set_gain(reward_model, load(cfg, "sft"), prompts[:512], cfg)
        print(f"  gain: scores × {gain:.3f}, so that r_1 − r_2 has root mean square 1 on SFT's pairs")
""",
        "test_the_reward_model_is_saved_with_its_gain",
    ),
    Bug(
        "the checkpoint deleted before the policy is saved",
        '        write_atomically(out / "p3o", policy.save_pretrained',
        '        checkpoint.unlink(missing_ok=True)\n        write_atomically(out / "p3o", policy.save_pretrained',
        "test_the_checkpoint_is_kept_until_the_policy_is_saved",
    ),
    Bug(
        "one held-out pair accepted",
        "if not train or len(heldout) < 2:",
        "if not train or len(heldout) < 1:",
        "test_one_held_out_pair_is_too_few",
    ),
    Bug(
        "V1: a ratio that overflows",
        "ratio = log_ratio.clamp(max=20).exp()",
        "ratio = log_ratio.exp()",
        "test_losses_are_finite_and_right_where_both_ratios_are_extreme",
    ),
]
