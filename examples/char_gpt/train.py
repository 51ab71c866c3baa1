"""A small GPT that learns Python's language reference, character by character.

    python examples/char_gpt/train.py fit
    python examples/char_gpt/train.py fit --training_parameters.max_steps 1000 --n_layers 6

The text is `pydoc_data.topics`, which every Python carries. The run is counted in optimizer
steps; documents of different lengths form a batch, so each batch weighs as many tokens as it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

PADDING = -100  # cross_entropy's own value for "not a target"


@dataclass(kw_only=True)
class CharGPTConfig(DreamTrainerConfig):
    project: str = "char_gpt"
    experiment: str | None = "small"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(
            max_steps=500,
            gradient_accumulation_steps=2,
            gradient_clip_val=1.0,
            val_every_n_epochs=None,
            val_every_n_steps=100,
            val_steps_per_epoch=10,
        )
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(every_n_steps=50, monitor="val/loss")
    )
    context: int = 128
    """Characters that the model sees."""
    width: int = 128
    """Features per character."""
    n_layers: int = 3
    """Transformer blocks."""
    n_heads: int = 4
    """Attention heads per block."""
    batch_size: int = 8
    """Pieces of text per batch on one rank."""
    lr: float = 4e-3
    """Highest learning rate."""
    sample_length: int = 300
    """Characters to generate at the end."""


class Text:
    """The language reference, split into documents, and its alphabet."""

    def __init__(self) -> None:
        self.documents = [topics[name] for name in sorted(topics)]
        self.alphabet = sorted(set("".join(self.documents)))
        self.index = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.index[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.alphabet[i] for i in tokens.tolist())


class Pieces(Dataset[Tensor]):
    """Pieces of documents, one character longer than the context; a document's last is shorter."""

    def __init__(self, text: Text, documents: list[str], context: int) -> None:
        encoded = [text.encode(document) for document in documents]
        self.pieces = [
            tokens[start : start + context + 1]
            for tokens in encoded
            for start in range(0, len(tokens) - 1, context)
        ]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Tensor:
        return self.pieces[index]


def pad(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs (batch, length) and targets shifted by one; what is padded is no target."""
    length = max(len(piece) for piece in pieces) - 1
    inputs = torch.zeros(len(pieces), length, dtype=torch.long)
    targets = torch.full((len(pieces), length), PADDING)
    for row, piece in enumerate(pieces):
        inputs[row, : len(piece) - 1] = piece[:-1]
        targets[row, : len(piece) - 1] = piece[1:]
    return inputs, targets


class Block(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, n_tokens: int, config: CharGPTConfig) -> None:
        super().__init__()
        self.context = config.context
        self.token = nn.Embedding(n_tokens, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.n_heads) for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, n_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Sample(Callback):
    """Prints what the trained model writes."""

    @torch.no_grad()
    def post_fit(self, trainer: CharGPTTrainer) -> None:
        trainer.model.eval()
        generator = torch.Generator().manual_seed(trainer.seed)
        tokens = trainer.text.encode("The ").unsqueeze(0)
        for _ in range(trainer.config.sample_length):
            logits = trainer.model(tokens[:, -trainer.config.context :].to(trainer.world.device))
            likely = (logits[0, -1].float().cpu() / 0.8).softmax(-1)
            following = torch.multinomial(likely, 1, generator=generator)
            tokens = torch.cat([tokens, following.unsqueeze(0)], dim=1)
        trainer.model.train()
        trainer.world.print(f"--- a sample\n{trainer.text.decode(tokens[0])}\n---")


class CharGPTTrainer(DreamTrainer):
    config: CharGPTConfig

    def __init__(self, config: CharGPTConfig, **kwargs: object) -> None:
        config.callbacks.setdefault("sample", Sample())
        super().__init__(config, **kwargs)
        self.text = Text()

    def configure_models(self) -> None:
        self.model = GPT(len(self.text.alphabet), self.config)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, betas=(0.9, 0.95))

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.config.lr, total_steps=self.num_training_steps
        )

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        documents = self.text.documents
        options = {"batch_size": self.config.batch_size, "collate_fn": pad}
        train = Pieces(self.text, documents[:-8], self.config.context)
        val = Pieces(self.text, documents[-8:], self.config.context)
        return DataLoader(train, shuffle=True, **options), DataLoader(val, **options)

    def compute_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, object]:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING)
        return {"loss": loss, "weight": (targets != PADDING).sum()}


if __name__ == "__main__":
    DreamCLI(CharGPTTrainer)
