"""Run stage 3 in TRL's engine, on several GPUs, after stages 1 and 2 of a run of p3o.py.

    accelerate launch --multi_gpu --num_processes 8 tests/own/trl_p3o.py RUN
    accelerate launch --multi_gpu --num_processes 8 tests/own/trl_p3o.py RUN --resume

RUN is the directory of a run of p3o.py whose stages 1 and 2 are finished. Its options apply here,
too; options of p3o.py on this command line replace them. --pairs and --minibatch count over all
processes, --micro-batch is for each process. Checkpoints go to --out, by default RUN-trl, and the
trained policy to the folder p3o in it.

How the loss fits in: RLOOTrainer samples two responses to each prompt and gives them the advantages
A and −A, A = r_1 − r_2 − β (h_1 − h_2) with h of the sampling policy. With ±A/2 as scores and the
sampling policy as reference, p3o_loss computes exactly the q of equation (2).
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data.preferences import InputError, first_start, load_examples, try_hub


def parse_run(run: Path, options: list[str]) -> p3o.Config:
    """Return the options of a run of p3o.py, replaced by those given here."""
    made_with = json.loads((run / "config.json").read_text())
    known = [f"--{key}={made_with[key]}" for key in vars(p3o.Config()) if key in made_with]
    out = f"--out={run.resolve()}-trl"
    return p3o.parse_config([*known, out, *options])


def trl_config(cfg: p3o.Config, **changes: Any) -> RLOOConfig:
    """Translate stage 3 to TRL: the same samples and updates, however many processes share them.

    Raises InputError for sizes that do not divide.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # accelerate sets it
    micro_batch = min(cfg.micro_batch, max(1, cfg.minibatch // processes))
    if cfg.minibatch % (processes * micro_batch) or cfg.pairs % cfg.minibatch:
        raise InputError(
            f"--pairs {cfg.pairs} must be a multiple of --minibatch {cfg.minibatch}, and that of "
            f"{processes} processes × --micro-batch {micro_batch}"
        )
    updates = cfg.inner_epochs * cfg.pairs // cfg.minibatch  # of an iteration
    options = dict(
        output_dir=cfg.out,
        seed=cfg.seed,
        num_generations=2,
        per_device_train_batch_size=2 * micro_batch,  # responses
        gradient_accumulation_steps=cfg.minibatch // (processes * micro_batch),
        steps_per_generation=cfg.pairs // (processes * micro_batch),
        num_iterations=cfg.inner_epochs,
        max_steps=cfg.iterations * updates,
        save_steps=p3o.CHECKPOINT_EVERY * updates,  # between two samplings, to resume exactly
        max_completion_length=cfg.response_tokens,
        beta=cfg.beta,
        learning_rate=cfg.p3o_lr,
        adam_beta2=0.95,
        weight_decay=0.0,
        normalize_advantages=False,
        disable_dropout=True,
        bf16=False,  # its rounding moves log-ratios of whole responses by more than ε
        report_to=[],
    )
    return RLOOConfig(**options | changes)


def count_positions(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give left-padded prompts their positions, as a model with learned positions needs them."""
    # NOTE TRL gives none: padding would shift every position
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


class P3OTrainer(RLOOTrainer):
    """RLOOTrainer with P3O's loss on whole pairs, and the token ids of p3o.py.

    `options` are RLOOTrainer's own, for example peft_config. Raises InputError for settings that
    would tear pairs or change the method.
    """

    def __init__(self, run: Path, cfg: p3o.Config, config: RLOOConfig, **options: Any) -> None:
        self.cfg = cfg
        self.encoder = AutoTokenizer.from_pretrained(run / "sft", padding_side="left")
        self.judge = AutoModelForSequenceClassification.from_pretrained(run / "reward")
        self.judge.to(config.device)
        limits = cfg.prompt_tokens, cfg.response_tokens
        examples, _ = load_examples(cfg.data, self.encoder, *limits, first_start(str(run)))
        self.ids = {example.text.prompt: example.prompt for example in examples}
        prompts = Dataset.from_list([{"prompt": example.text.prompt} for example in examples])
        super().__init__(
            str(run / "sft"), self.score, config, prompts, processing_class=self.encoder, **options
        )
        if config.num_generations != 2 or config.per_device_train_batch_size % 2:
            raise InputError("P3O needs two generations and an even batch")
        if config.normalize_advantages or config.reward_clip_range:
            raise InputError("P3O needs scores as they are")
        if config.mask_truncated_completions:
            raise InputError("P3O counts the KL of a truncated response, too")
        for model in (self.model, self.ref_model):
            if model is not None:  # an adapter has the model without it as its reference
                model.register_forward_pre_hook(count_positions, with_kwargs=True)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Return the ids that p3o.py trained on: TRL would add or lose special tokens."""
        return [self.ids[text] for text in prompts]

    @torch.no_grad()
    def score(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Score the sampled ids, EOS included; TRL by itself tokenizes the text again."""
        ids, response_mask = p3o.collate(self.encode(prompts), completion_ids, self.judge)
        return p3o.reward_scores(self.judge, ids, response_mask).tolist()

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return self.encode(prompts), None, {}

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        rows = super()._generate_and_score_completions(inputs)  # y_1, y_2 of each prompt in turn
        # NOTE TRL shuffles and splits what this returns: a pair must be one row of it
        return {key: value.unflatten(0, (-1, 2)) for key, value in rows.items()}  # (B, 2, …)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        rows = {key: value.flatten(0, 1) for key, value in inputs.items()}  # (2B, …)
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
        length = rows["completion_ids"].shape[1]
        logprobs, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, length)
        logprobs = (logprobs * rows["completion_mask"]).sum(1).view(-1, 2)  # (B, 2)
        old_logprobs = inputs["old_logps"]  # (B, 2)
        loss, metrics = p3o.p3o_loss(
            logprobs,
            old_logprobs,
            old_logprobs,
            inputs["advantages"] / 2,  # (B, 2): A/2, −A/2
            beta=self.cfg.beta,
            clip=self.cfg.clip,
            clip_range=self.cfg.clip_range,
        )
        for name, value in metrics.items():
            self._metrics["train"][name].append(value.item())
        return loss


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any other option is one of p3o.py.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run of p3o.py")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args, options = parser.parse_known_args(argv)
    try:
        cfg = parse_run(args.run, options)
        last = get_last_checkpoint(cfg.out) if Path(cfg.out).exists() else None
        if args.resume and not last:
            raise InputError(f"{cfg.out} has no checkpoint to resume from")
        if last and not args.resume:
            raise InputError(f"{cfg.out} has checkpoints; add --resume or change --out")
        try_hub(cfg.data)
        trainer = P3OTrainer(args.run, cfg, trl_config(cfg))
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(Path(cfg.out) / "p3o"))
    except (InputError, OSError) as error:
        sys.exit(f"trl_p3o.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
