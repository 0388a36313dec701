"""Table 12, Figures 33 to 36: a pretrained BERT fine-tuned to tell paraphrases, by transformers' Trainer.

SGD at Adam's lr, SGD at an lr of its own, Adam, and sign descent (`SteepestDescent(q=1)`, no momentum). By default the model is
not BERT-base and the data not MRPC: it is a tiny BERT, pretrained on the spot on sentences from a small grammar,
then fine-tuned on pairs of such sentences. --model and --data take real weights and MRPC.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from finetuning import OPTIMIZERS, SMALL_SGD, TUNED_SGD, Run, compare, distances, draw, runs_of, table
from paper import argument_parser, settings_of
from paraphrases import Pair, made, mrpc, words
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pysteep.diagnostics import Spectrum, hessian_spectrum

TINY_SMALL, TINY_LARGE = [5e-4, 1e-3, 2e-3], [1e-2, 3e-2, 1e-1, 3e-1]
REAL_SMALL, REAL_LARGE = [5e-5, 7e-5, 9e-5], [1e-2, 5e-2, 1e-1, 5e-1]
PAPER = {
    SMALL_SGD: "43.87 ± 24.02, 5002, 0.73",
    TUNED_SGD: "84.80 ± 1.00, 6067, 1.26",
    "Adam": "85.95 ± 0.64, 31080, 5.57",
}
"""Validation accuracy, L1 and L2 distance [Table 12]."""

Examples = list[dict[str, Any]]


class Progress(TrainerCallback):
    """One bar for all trainings."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count the step."""
        self.bar.update()


def fit(
    model: nn.Module, data: Examples, collator: Any, optimizer: torch.optim.Optimizer, epochs: int, seed: int, bar: Any
) -> None:
    """Train by the Trainer, batches of 32, lr falling linearly to 0."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            max_grad_norm=0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collator, data, optimizers=(optimizer, None), callbacks=[Progress(bar)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the grammar."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words()])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))


def encoded(pairs: list[Pair], tokenizer: Any) -> Examples:
    """What the model is given, with labels."""
    texts = tokenizer([pair.first for pair in pairs], [pair.second for pair in pairs], truncation=True, max_length=128)
    return [{**{name: texts[name][i] for name in texts}, "labels": int(pair.same)} for i, pair in enumerate(pairs)]


def pretrained(tokenizer: Any, steps: int, bar: Any) -> BertForPreTraining:
    """A tiny BERT that was to fill in masked words, and to tell pairs that say the same from pairs with three differences."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForPreTraining(config)
    examples = encoded(made(32 * steps, seed=1, changes=3), tokenizer)
    for example in examples:
        example["next_sentence_label"] = 1 - example.pop("labels")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.2)
    fit(model, examples, collator, torch.optim.AdamW(model.parameters(), lr=3e-3), 1, 0, bar)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Examples, collator: Any) -> float:
    """In percent."""
    model.eval()
    device, right = next(model.parameters()).device, 0
    for i in range(0, len(data), 128):
        batch = collator(data[i : i + 128]).to(device)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return 100 * right / len(data)


def main() -> None:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="folder of a pretrained BERT, with tokenizer")
    add("--data", type=Path, metavar="DIR", help="folder of MRPC: train.tsv and dev.tsv, or the msr_paraphrase files")
    add("--seeds", type=int, help="default 3, with --quick 1")
    add("--epochs", type=int, help="default 5, with --quick 1")
    add("-k", type=int, help="eigenvalues of largest magnitude (default 25, with --quick 10)")
    asked = parser.parse_args()
    if (asked.model is None) != (asked.data is None):
        parser.error("--model and --data must be given together")
    transformers.logging.set_verbosity_error()
    seeds, epochs = asked.seeds or (1 if asked.quick else 3), asked.epochs or (1 if asked.quick else 5)
    k = asked.k or (10 if asked.quick else 25)
    if asked.model:
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        train_pairs, test_pairs = mrpc(asked.data)
        small, large, steps = REAL_SMALL, REAL_LARGE, 0
    else:
        torch.set_num_threads(1)  # for matrices so small more of them wait for each other
        tokenizer = tiny_tokenizer()
        train_pairs, test_pairs = made(500 if asked.quick else 4000, seed=2), made(2000, seed=3)
        small, large, steps = TINY_SMALL, TINY_LARGE, 100 if asked.quick else 4000
    if asked.quick:
        small, large = small[1:2], large[1:2]
    train, test = encoded(train_pairs, tokenizer), encoded(test_pairs, tokenizer)
    collator = DataCollatorWithPadding(tokenizer)
    trainings = runs_of(seeds, small, large) * epochs * -(-len(train) // 32)
    with tqdm(total=steps + trainings + 5 * seeds, unit="step") as bar:
        body = None if asked.model else pretrained(tokenizer, steps, bar)

        def fresh(seed: int) -> nn.Module:
            """The pretrained net with a new head."""
            torch.manual_seed(seed)
            if body is None:
                return AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=2)
            model = BertForSequenceClassification(body.config)
            model.bert.load_state_dict(body.bert.state_dict())
            return model

        def fine_tune(name: str, lr: float, seed: int) -> Run:
            bar.set_description(f"{name}, lr {lr:g}, seed {seed}")
            model = fresh(seed)
            before = [param.detach().clone() for param in model.parameters()]
            fit(model, train, collator, OPTIMIZERS[name](model.parameters(), lr=lr), epochs, seed, bar)
            model.cpu()
            validation, unseen = (accuracy(model, part, collator) for part in (test[: len(test) // 2], test[len(test) // 2 :]))
            return Run(model, validation, unseen, *distances(before, list(model.parameters())))

        found = compare(fine_tune, seeds, small, large)
        nets = {"before": [fresh(seed) for seed in range(seeds)]}
        nets |= {name: [run.net for run in runs] for name, (_, runs) in found.items()}
        batches = [dict(collator(train[: 64 if asked.quick else 256]))]
        spectra: dict[str, list[Spectrum]] = {name: [] for name in nets}
        for name, of_seeds in nets.items():
            bar.set_description(f"spectrum, {name}")
            for net in of_seeds:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                spectra[name].append(hessian_spectrum(net.eval().to(device), loss, batches, k, "magnitude", progress=False))
                bar.update()
    settings = settings_of(asked)
    subject = f"{asked.model.name} on MRPC" if asked.model else "a tiny BERT on sentences of a grammar, not MRPC"
    title = f"{subject}: the {k} eigenvalues of largest magnitude at the end, {seeds} seeds"
    settings.save(draw(spectra, found, title), "finetune_bert")
    lines = [*table(spectra, found, "BERT-base on MRPC", PAPER), "", f"Ours: {subject}."]
    settings.write(lines, "finetune_bert")


def loss(output: Any, _: Any) -> torch.Tensor:
    return output.loss


if __name__ == "__main__":
    main()
