r"""A model of Hugging Face's transformers, trained from nothing on Python's language reference.

    python examples/hf_transformers/train.py fit
    python examples/hf_transformers/train.py fit --model.n_layer 4 --lr 2e-3
    python examples/hf_transformers/train.py fit --experiment more \
        --checkpoint_parameters.init_from runs/hf_transformers/default/gpt2/pretrained

Tokens are characters of `pydoc_data.topics`, so nothing is downloaded. At the end the run has a
folder `pretrained` that `AutoModelForCausalLM.from_pretrained` reads. Needs transformers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

IGNORED = -100  # transformers' own value for "not a target"


@dataclass(kw_only=True)
class ModelParameters:
    """Sizes of the model, by the names that GPT2Config has for them."""

    n_embd: int = 96
    """Features per character."""
    n_layer: int = 2
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads per block."""
    n_positions: int = 96
    """Characters that the model sees."""
    resid_pdrop: float = 0.05
    """Share of features dropped behind each attention and MLP."""


@dataclass(kw_only=True)
class HFConfig(DreamTrainerConfig):
    """A small GPT-2 and the text that it reads."""

    project: str = "hf_transformers"
    experiment: str | None = "gpt2"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(
            max_steps=400,
            gradient_clip_val=1.0,
            val_every_n_epochs=None,
            val_every_n_steps=100,
            val_steps_per_epoch=10,
        )
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(every_n_steps=50, monitor="val/loss")
    )
    model: ModelParameters = field(default_factory=ModelParameters)
    """Sizes of the model."""
    batch_size: int = 16
    """Pieces of text per batch on one rank."""
    lr: float = 4e-3
    """Highest learning rate."""


class Text:
    """The language reference, and its alphabet in place of a tokenizer."""

    def __init__(self) -> None:
        self.documents = [topics[name] for name in sorted(topics)]
        self.alphabet = sorted(set("".join(self.documents)))
        self.index = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.index[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.alphabet[i] for i in tokens.tolist())


class Pieces(Dataset[Tensor]):
    """Documents cut into pieces; the last piece of each is shorter than the others."""

    def __init__(self, text: Text, documents: list[str], length: int) -> None:
        cut = [piece for one in documents for piece in text.encode(one).split(length)]
        self.pieces = [piece for piece in cut if len(piece) > 1]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Tensor:
        return self.pieces[index]


def collate(pieces: list[Tensor]) -> dict[str, Tensor]:
    """Arguments of a transformers model; it shifts the labels itself."""
    lengths = torch.tensor([len(piece) for piece in pieces])
    input_ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.where(attention_mask.bool(), IGNORED),
    }


class SavePretrained(Callback):
    """Prints what the trained model writes, and saves it as transformers does."""

    @torch.no_grad()
    def post_fit(self, trainer: HFTrainer) -> None:
        if not trainer.world.is_global_zero:
            return
        model = trainer.named_models()["model"]  # transformers' own class, without a wrapper
        model.save_pretrained(trainer.run_directory / "pretrained")
        model.eval()
        tokens = trainer.text.encode("The ")[None].to(trainer.world.device)
        length = model.config.n_positions - tokens.shape[1]
        # A longer run goes on from the streams as they are now: what is drawn here must not show.
        with torch.random.fork_rng():
            torch.manual_seed(trainer.seed)
            written = model.generate(
                tokens, min_new_tokens=length, max_new_tokens=length, do_sample=True, top_k=5
            )
        model.train()
        print(f"--- a sample\n{trainer.text.decode(written[0])}\n---")


class HFTrainer(DreamTrainer):
    config: HFConfig

    def __init__(self, config: HFConfig, **kwargs: object) -> None:
        config.callbacks.setdefault("save_pretrained", SavePretrained())
        super().__init__(config, **kwargs)
        self.text = Text()

    def configure_models(self) -> None:
        end = self.text.index["\n"]
        self.model = GPT2LMHeadModel(
            GPT2Config(
                **asdict(self.config.model),
                vocab_size=len(self.text.alphabet),
                bos_token_id=end,
                eos_token_id=end,
            )
        )
        self.model.loss_type = "ForCausalLM"  # what it takes anyway, after a warning

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, betas=(0.9, 0.95))

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.config.lr, total_steps=self.num_training_steps
        )

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        documents, length = self.text.documents, self.config.model.n_positions
        options = {"batch_size": self.config.batch_size, "collate_fn": collate}
        train = Pieces(self.text, documents[:-8], length)
        val = Pieces(self.text, documents[-8:], length)
        return DataLoader(train, shuffle=True, **options), DataLoader(val, **options)

    def compute_loss(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        # The model's own loss, a mean over the characters that have one before them.
        output = self.model(**batch)
        return {"loss": output.loss, "weight": batch["attention_mask"][:, 1:].sum()}


if __name__ == "__main__":
    DreamCLI(HFTrainer)
