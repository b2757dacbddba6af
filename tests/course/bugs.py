"""A catalogue of bugs that RLHF code really has, each planted by replacing a few lines.

`old` occurs exactly once in the file; `caught_by` is a test that fails with the bug and whose
message leads to it. BUGS are in p3o.py and may be handed out; DATA_BUGS are in data/.
"""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    old: str
    new: str
    caught_by: str
    file: str = "p3o.py"


BUGS = [
    Bug(
        "long prompts lose the middle of a turn first",
        "while len(ids) > limit and HUMAN in text[1:]:",
        "while False:",
        "test_a_long_prompt_loses_whole_turns_then_the_beginning_of_its_last",
    ),
    Bug(
        "prompts cut at the end",
        "return ids[-limit:]",
        "return ids[:limit]",
        "test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos",
    ),
    Bug(
        "EOS forged after a response that was cut",
        "return [*ids, tokenizer.eos_token_id][:limit]",
        "return [*ids[: limit - 1], tokenizer.eos_token_id]",
        "test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos",
    ),
    Bug(
        "no EOS in the training data",
        "return [*ids, tokenizer.eos_token_id][:limit]",
        "return ids[:limit]",
        "test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos",
    ),
    Bug(
        "mask one token short: EOS excluded",
        "[True] * len(response)",
        "[True] * (len(response) - 1) + [False]",
        "test_the_mask_covers_the_response_and_its_eos_and_nothing_else",
    ),
    Bug(
        "mask begins at the last prompt token",
        "[False] * len(prompt) + [True] * len(response)",
        "[False] * (len(prompt) - 1) + [True] * (len(response) + 1)",
        "test_the_mask_covers_the_response_and_its_eos_and_nothing_else",
    ),
    Bug(
        "mask from ids, not positions: hides EOS where it is the padding",
        "response_mask = pad_sequence(masks, batch_first=True)",
        "response_mask = pad_sequence(masks, True) & (ids != model.config.pad_token_id)",
        "test_the_mask_keeps_eos_where_eos_is_the_padding_too",
    ),
    Bug(
        "only the 50 likeliest tokens sampled",
        "probs = logits.float().softmax(-1)",
        "probs = logits.where(logits >= logits.topk(50).values[:, -1:], -math.inf).float().softmax(-1)",
        "test_the_whole_vocabulary_is_sampled",
    ),
    Bug(
        "sampled at another temperature than scored",
        "probs = logits.float().softmax(-1)",
        "probs = (logits.float() / 0.8).softmax(-1)",
        "test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt",
    ),
    Bug(
        "padding of short prompts not masked",
        "attention_mask=(column >= left).long()",
        "attention_mask=(column >= 0 * left).long()",
        "test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt",
    ),
    Bug(
        "positions count the padding",
        "positions = (column - left).clamp(min=0)",
        "positions = column.expand(len(left), -1)",
        "test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt",
    ),
    Bug(
        "pairs interleaved wrongly",
        "return ids.view(len(prompts), n, -1), response_mask",
        "return ids.view(n, len(prompts), -1).transpose(0, 1), response_mask",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "responses given to the wrong prompts",
        "rows = [prompt for prompt in prompts for _ in range(n)]",
        "rows = prompts * n",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "sampled EOS left out of the mask",
        "responses[i].append(token)",
        "responses[i] += [token] * (token != model.config.eos_token_id)",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "everything after EOS counts as response",
        "(unread != model.config.eos_token_id).nonzero()",
        "torch.ones_like(unread).nonzero()",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "when a response has ended, tokens go to the rows before it",
        "active = active[going]",
        "active = active[: len(going)]",
        "test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos",
    ),
    Bug(
        "both responses of a pair from the same random numbers",
        "torch.rand_like(cdf[:, :1])",
        "torch.rand(len(prompts), 1, device=model.device)[active // n]",
        "test_the_two_responses_of_a_pair_are_independent",
    ),
    Bug(
        "log-probs read at the token itself",
        "[:, :end]).last_hidden_state  # (N, end, D)\n    used",
        "[:, : end + 1]).last_hidden_state[:, 1:]\n    used",
        "test_a_response_tokens_log_prob_is_read_one_position_earlier",
    ),
    Bug(
        "softmax in the model's precision",
        "logits = model.get_output_embeddings()(used).float()",
        "logits = model.get_output_embeddings()(used)",
        "test_log_probs_are_computed_in_float32_even_in_a_bfloat16_model",
    ),
    Bug(
        "masked by multiplication: NaN · 0 is NaN",
        (
            "    return picked.new_zeros(predicted.shape).masked_scatter(predicted, picked)"
            "  # (…, T−1)\n"
        ),
        (
            "    zeros = torch.zeros(predicted.shape, device=ids.device)\n"
            "    every = model.get_output_embeddings()(hidden).float().log_softmax(-1)\n"
            "    following = ids.flatten(0, -2)[:, 1 : end + 1, None]\n"
            "    zeros.view(len(hidden), -1)[:, :end] = every.gather(-1, following)[..., 0]\n"
            "    return zeros * predicted\n"
        ),
        "test_positions_outside_the_response_are_left_out_not_multiplied_by_zero",
    ),
    Bug(
        "score read one token early",
        "last = response_mask.flatten(0, -2).cumsum(-1).argmax(-1)",
        "last = response_mask.flatten(0, -2).cumsum(-1).argmax(-1) - 1",
        "test_a_score_is_read_at_the_last_response_token",
    ),
    Bug(
        "score read at the end of the row, padding or not",
        "hidden[row, last]",
        "hidden[:, -1]",
        "test_a_score_is_the_same_alone_and_in_a_padded_batch",
    ),
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
        "weight = ratio.detach().clamp(1 / ratio_bound, ratio_bound)",
        "weight = ratio.detach()",
        "test_v1_bounds_the_partners_weight_by_c_and_gives_it_no_gradient",
    ),
    Bug(
        "V1: own ratio as weight, not the partner's",
        "partner = weight.flip(-1)",
        "partner = weight",
        "test_unclipped_both_variants_are_the_pairwise_policy_gradient_of_each_sample_at_every_policy",
    ),
    Bug(
        "V1: the partner's weight carries a gradient",
        "weight = ratio.detach().clamp(1 / ratio_bound, ratio_bound)",
        "weight = ratio.clamp(1 / ratio_bound, ratio_bound)",
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
        (
            "    scores = (scores - scores.mean()) / scores.std()\n"
            "    q = (scores[:, 0] - scores[:, 1]).detach() - beta"
        ),
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
    Bug(
        "updated before the gradient is clipped",
        ("    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()\n"),
        (
            "    optimizer.step()\n"
            "    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()\n"
        ),
        "test_a_step_clips_the_gradient_to_norm_1_and_reports_its_norm_before",
    ),
    Bug(
        "gradients pile up",
        ("    optimizer.zero_grad()\n"),
        "",
        "test_a_step_forgets_the_gradient_of_the_step_before",
    ),
    Bug(
        "SFT on the rejected responses",
        "chosen = [example.chosen for example in batch]",
        "chosen = [example.rejected for example in batch]",
        "test_the_sft_loss_is_the_mean_over_the_tokens_of_the_chosen_responses",
    ),
    Bug(
        "SFT loss averaged over padding",
        "loss = -logprobs.sum() / response_mask.sum()",
        "loss = -logprobs.sum() / response_mask[:, 1:].numel()",
        "test_the_sft_loss_is_the_mean_over_the_tokens_of_the_chosen_responses",
    ),
    Bug(
        "dropout on while the policy trains",
        ("    policy.eval()\n    batches = shuffled(prompts"),
        ("    policy.train()\n    batches = shuffled(prompts"),
        "test_every_stage_turns_dropout_off",
    ),
    Bug(
        "dropout on while the reward model trains",
        ("    model.eval()\n    torch.nn.init.zeros_"),
        ("    model.train()\n    torch.nn.init.zeros_"),
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
        "differences.append(scores[:, 0] - scores[:, 1])",
        "differences.append(scores.flatten() - scores.mean())",
        "test_the_gain_does_not_depend_on_an_offset_of_the_reward",
    ),
    Bug(
        "places in the minibatch taken for places in the batch",
        "minibatch.sort().values",
        "minibatch.sort().indices",
        "test_each_pass_sees_each_pair_once_and_each_iteration_new_pairs",
    ),
    Bug(
        "KL to the sampling policy, not to the reference",
        "partial(sequence_logprobs, reference)",
        "partial(sequence_logprobs, policy)",
        "test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference",
    ),
    Bug(
        "the reference is the policy: it learns",
        ('        policy = load(out / "sft")\n'),
        ("        policy = sft\n"),
        "test_reference_and_reward_model_are_unchanged_by_stage_3",
    ),
    Bug(
        "mean over tokens on one side of the ratio",
        "logprobs = sequence_logprobs(policy, ids[part], response_mask[part])",
        "logprobs = response_logprobs(policy, ids[part], response_mask[part]).mean(-1)",
        "test_with_no_learning_rate_ratio_is_1_and_kl_0_at_every_inner_step",
    ),
    Bug(
        "shuffled log-probs with unshuffled scores",
        ("                        scores[part],\n"),
        ("                        scores[: len(part)],\n"),
        "test_score_and_log_probs_of_a_pair_belong_together",
    ),
    Bug(
        "pairs torn by shuffling rows",
        ("                        scores[part],\n"),
        (
            "                        scores[part].flatten()[torch.randperm(2 * len(part))].view(-1, 2),\n"
        ),
        "test_pairs_stay_together_from_sampling_to_loss",
    ),
    Bug(
        "reported KL of the wrong sign",
        '"objective/kl": old_logprobs - ref_logprobs',
        '"objective/kl": ref_logprobs - old_logprobs',
        "test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference",
    ),
    Bug(
        "reward head neither clipped nor counted in the norm",
        "clip_grad_norm_(model.parameters(), 1.0)",
        'clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)',
        "test_a_step_clips_the_norm_over_all_parameter_groups",
    ),
    Bug(
        "micro-batches count alike, whatever their size",
        "(loss * len(part) / len(minibatch)).backward()",
        "(loss * cfg.micro_batch / cfg.minibatch).backward()",
        "test_micro_batches_change_memory_and_not_the_update",
    ),
    Bug(
        "an update for each micro-batch",
        (
            "                norm = gradient_step(policy, optimizer, lr)\n"
            '                sums["policy/grad_norm"] += norm * len(minibatch)'
        ),
        (
            "                    norm = gradient_step(policy, optimizer, lr)\n"
            '                    sums["policy/grad_norm"] += norm * len(part)'
        ),
        "test_micro_batches_change_memory_and_not_the_update",
    ),
    Bug(
        "schedule of one pass, training of several",
        "learning_rate(cfg.reward_lr, step, steps)",
        "learning_rate(cfg.reward_lr, step, steps // cfg.epochs)",
        "test_every_stages_learning_rate_falls_until_its_last_update_and_not_before",
    ),
    Bug(
        "rows never shuffled",
        "torch.randperm(len(rows))",
        "torch.arange(len(rows))",
        "test_every_stage_sees_each_row_once_a_pass_in_a_new_order",
    ),
    Bug(
        "weight decay pulls the policy away from the reference",
        '{"params": policy.parameters(), "weight_decay": 0.0}',
        '{"params": policy.parameters()}',
        "test_a_loss_without_gradient_leaves_the_policy_where_it_is",
    ),
    Bug(
        "stages draw from whatever the generator holds",
        ('    torch.manual_seed(zlib.crc32(f"{cfg.seed} {stage}".encode()))\n'),
        "",
        "test_a_finished_run_trains_nothing_and_gives_the_same_figures_again",
    ),
    Bug(
        "a checkpoint without AdamW's moments",
        ('    optimizer.load_state_dict(state["optimizer"])\n'),
        "",
        "test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights",
    ),
    Bug(
        "a checkpoint whose random generator is not put back",
        ('    torch.set_rng_state(state["cpu_generator"])\n'),
        "",
        "test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights",
    ),
    Bug(
        "a killed run's metrics stay and come twice",
        "self.lines[step:] = [json.dumps(row)]",
        "self.lines.append(json.dumps(row))",
        "test_a_step_done_again_replaces_its_metrics_and_those_after_it",
    ),
    Bug(
        "a failed self-check prints and goes on",
        ('    assert holds, f"check failed: {claim}"\n'),
        "",
        "test_a_failed_self_check_stops_the_run",
    ),
    Bug(
        "a folder published half-written after an error",
        ("    yield scratch\n    scratch.replace(path)"),
        ("    try:\n        yield scratch\n    finally:\n        scratch.replace(path)"),
        "test_what_is_written_appears_whole_or_not_at_all",
    ),
    Bug(
        "--iterations not compared on resuming",
        'free = ["out", "micro_batch", "eval_prompts"]',
        'free = ["out", "micro_batch", "eval_prompts", "iterations"]',
        "test_what_changes_the_training_is_compared_when_a_run_goes_on",
    ),
    Bug(
        "the models of stages 2 and 3 loaded in bf16",
        "kind.from_pretrained(folder, dtype=torch.float32",
        "kind.from_pretrained(folder, dtype=torch.bfloat16",
        "test_every_stage_starts_from_weights_in_float32",
    ),
    Bug(
        "the reward model saved before its gain",
        (
            "        gain = set_gain(reward_model, sft, prompts[:GAIN_PROMPTS], cfg)\n"
            '        print(f"  scores × {gain:.3f}: r_1 − r_2 has root mean square 1 on SFT\'s pairs")\n'
            '        save(out / "reward", reward_model, tokenizer)\n'
        ),
        (
            '        save(out / "reward", reward_model, tokenizer)\n'
            "        gain = set_gain(reward_model, sft, prompts[:GAIN_PROMPTS], cfg)\n"
            '        print(f"  scores × {gain:.3f}: r_1 − r_2 has root mean square 1 on SFT\'s pairs")\n'
        ),
        "test_the_reward_model_is_saved_with_its_gain",
    ),
    Bug(
        "the checkpoint deleted before the policy is saved",
        ('        save(out / "p3o", policy, tokenizer)\n'),
        (
            "        checkpoint.unlink(missing_ok=True)\n"
            '        save(out / "p3o", policy, tokenizer)\n'
        ),
        "test_the_checkpoint_is_kept_until_the_policy_is_saved",
    ),
    Bug(
        "V1: a ratio that overflows",
        "ratio = log_ratio.clamp(max=20).exp()",
        "ratio = log_ratio.exp()",
        "test_losses_are_finite_and_right_where_both_ratios_are_extreme",
    ),
    Bug(
        "the first update of a stage has a learning rate of 0",
        "min((step + 1) / warmup,",
        "min(step / warmup,",
        "test_the_learning_rate_warms_up_over_a_twentieth_then_falls_and_is_never_0",
    ),
    Bug(
        "a model that caps its logits taken",
        "if not torch.allclose(model(ids).logits, plain):",
        "if False:",
        "test_a_model_that_changes_its_logits_after_the_head_is_refused_by_name",
    ),
    Bug(
        "the tokenizer's own BOS between prompt and response",
        ("    ids = tokenizer.encode(text, add_special_tokens=False)\n    return [*ids"),
        ("    ids = tokenizer.encode(text)\n    return [*ids"),
        "test_no_token_is_added_by_the_tokenizer_itself",
    ),
    Bug(
        "an EOS in the prompt counts as the response's",
        "((ids == model.config.eos_token_id) & response_mask)",
        "(ids == model.config.eos_token_id)",
        "test_an_eos_of_the_prompt_does_not_finish_the_response",
    ),
    Bug(
        "the checkpoint left in a finished run",
        ("    checkpoint.unlink(missing_ok=True)\n"),
        "",
        "test_the_checkpoint_is_kept_until_the_policy_is_saved",
    ),
    Bug(
        "held-out pairs trained on",
        "examples = tokenize(train_pairs, tokenizer, cfg)",
        "examples = tokenize(train_pairs + heldout_pairs, tokenizer, cfg)",
        "test_training_sees_no_held_out_pair_and_the_evaluation_nothing_else",
    ),
    Bug(
        "the gain set on the base model's samples",
        "gain = set_gain(reward_model, sft,",
        "gain = set_gain(reward_model, policy,",
        "test_the_gain_is_set_on_samples_of_the_sft_model_for_a_few_prompts",
    ),
    Bug(
        "another learning rate accepted after its stage",
        " if stage not in done]",
        "]",
        "test_what_changes_the_training_is_compared_when_a_run_goes_on",
    ),
    Bug(
        "the seconds of every step count from the beginning",
        ("        self.last = now\n"),
        "",
        "test_the_seconds_of_all_steps_add_up_also_over_a_run_that_was_stopped",
    ),
    Bug(
        "what a killed write left is written into",
        ("    shutil.rmtree(scratch, ignore_errors=True)\n"),
        "",
        "test_what_a_killed_write_left_is_no_obstacle",
    ),
    Bug(
        "a lower --lr overruled by the checkpoint's",
        ('        group["lr"] = lr * group.get("lr_scale", 1)\n'),
        ('        group["lr"] = group.setdefault("peak", lr) * group.get("lr_scale", 1)\n'),
        "test_a_lower_rate_is_used_from_the_checkpoint_on",
    ),
    Bug(
        "kl of SFT's answers, not of P3O's",
        '"kl": logprobs - sequence_logprobs(sft, ids, response_mask)',
        '"kl": logprobs - sequence_logprobs(policy, ids, response_mask)',
        "test_kl_score_and_finished_are_those_of_each_models_own_answers",
    ),
    Bug(
        "the prompts answered are not those judged",
        "parts_of(examples[: cfg.eval_prompts], cfg.minibatch",
        "parts_of(examples[-cfg.eval_prompts :], cfg.minibatch",
        "test_the_prompts_that_are_answered_are_those_that_are_judged_and_shown",
    ),
    Bug(
        "stage 3 trains on held-out prompts",
        "    prompts = [example.prompt for example in examples]\n    if not",
        "    prompts = [example.prompt for example in heldout]\n    if not",
        "test_training_sees_no_held_out_pair_and_the_evaluation_nothing_else",
    ),
    Bug(
        "the evaluation of SFT as the policy",
        'policy = load(out / "p3o")',
        'policy = load(out / "sft")',
        "test_what_is_evaluated_is_what_was_saved",
    ),
    Bug(
        "another seed, the same draws",
        'f"{cfg.seed} {stage}"',
        'f"{stage}"',
        "test_every_stage_draws_by_the_seed",
    ),
    Bug(
        "the reward model's fresh head as slow as its body",
        '"lr_scale": 10}',
        '"lr_scale": 1}',
        "test_the_fresh_head_of_the_reward_model_has_ten_times_the_rate",
    ),
    Bug(
        "no embedding for the new pad token",
        "        model.resize_token_embeddings(len(tokenizer))\n",
        "",
        "test_a_base_model_without_a_pad_token_gets_one_inside_its_vocabulary",
    ),
]

DATA_BUGS = [
    Bug(
        "split at the first Assistant turn, not at the last shared one",
        "end = shared.rfind(ASSISTANT)",
        "end = shared.find(ASSISTANT)",
        "test_a_row_is_split_after_the_last_assistant_turn_that_both_share",
        "data/preferences.py",
    ),
    Bug(
        "split each dialogue at its own last turn",
        "end = shared.rfind(ASSISTANT) + len(ASSISTANT)",
        "end = chosen.rfind(ASSISTANT) + len(ASSISTANT)",
        "test_rows_that_cannot_be_used_are_dropped_with_their_reason",
        "data/preferences.py",
    ),
    Bug(
        "hold out rows, not prompts",
        "tenths = [zlib.crc32(pair.prompt.encode()) % 10 for pair in train]",
        "tenths = [zlib.crc32(repr(pair).encode()) % 10 for pair in train]",
        "test_a_single_file_holds_out_whole_prompts",
        "data/preferences.py",
    ),
    Bug(
        "one side of a row with a second question kept",
        "if HUMAN in pair.chosen + pair.rejected:",
        "if HUMAN in pair.chosen:",
        "test_rows_that_cannot_be_used_are_dropped_with_their_reason",
        "data/preferences.py",
    ),
    Bug(
        "interval too narrow: deviation / n",
        "statistics.stdev(values) / math.sqrt(len(values))",
        "statistics.stdev(values) / len(values)",
        "test_figures_are_told_with_half_of_their_95_percent_interval",
        "data/judge.py",
    ),
    Bug(
        "a tie counts as a win",
        "(score > other) + 0.5 * (score == other)",
        "float(score >= other)",
        "test_evaluation_by_hand",
        "data/judge.py",
    ),
    Bug(
        "one held-out pair accepted",
        "if not train or len(heldout) < 2:",
        "if not train or len(heldout) < 1:",
        "test_one_held_out_pair_is_too_few",
        "data/preferences.py",
    ),
    Bug(
        "EOS of the chat template and another after it",
        ".split(tokenizer.eos_token)[0]",
        "",
        "test_messages_go_through_the_tokenizers_own_chat_template",
        "data/preferences.py",
    ),
    Bug(
        "messages shared by both answers taken for the prompt, all of them",
        "while shared < min(len(chosen), len(rejected)) - 1 and",
        "while shared < min(len(chosen), len(rejected)) and",
        "test_messages_that_cannot_be_used_are_dropped_with_their_reason",
        "data/preferences.py",
    ),
    Bug(
        "the judge of one model's answers used for both",
        'columns[f"gold_{name}"] = list(map(gold_reward, prompts, texts))',
        'columns[f"gold_{name}"] = list(map(gold_reward, prompts, answers["policy"]))',
        "test_evaluation_by_hand",
        "data/judge.py",
    ),
]
