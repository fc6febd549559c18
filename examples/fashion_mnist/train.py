"""Train the demo model: a small timm ViT on Fashion-MNIST, on one CPU core, in about two hours.

The images are 28x28 and the patches 2x2, so the model sees 196 patches, as a ViT-B/16 does at 224
pixels. To afford that on a CPU most of the training runs with timm's patch dropout (a random
quarter of the patches); the last part sees all of them. A model trained this way is also more
tolerant of missing patches than one that was not, which flatters random pruning more than ours.

Data: Debian's package ``dataset-fashion-mnist`` (Expat license)::

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb data
    python examples/fashion_mnist/train.py data/usr/share/datasets/fashion-mnist

Writes ``vit/`` (a timm hub folder: ``config.json`` + ``model.safetensors``, float16 weights) and
``test_slice.npz`` (the first 3,000 test images and their labels).
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 28,
    "patch_size": 2,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "in_chans": 1,
    "num_classes": 10,
}
MEAN, STD = 0.286, 0.353
CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file (the format of MNIST) as uint8."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", count=dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def normalize(images: np.ndarray) -> torch.Tensor:
    return ((torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Shift by up to two pixels, flip half, erase a small rectangle in a quarter of the images."""
    count, _, height, width = images.shape
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    top, left = torch.randint(0, 5, (2, count, 1, 1))
    rows = (top + torch.arange(height).view(1, -1, 1)).expand(-1, -1, width)
    columns = (left + torch.arange(width).view(1, 1, -1)).expand(-1, height, -1)
    flip = torch.rand(count, 1, 1) < 0.5
    columns = torch.where(flip, columns.flip(2), columns)
    shifted = padded[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
    for index in torch.nonzero(torch.rand(count) < 0.25).flatten().tolist():
        tall, wide = torch.randint(4, 11, (2,)).tolist()
        y = int(torch.randint(0, height - tall, ()))
        x = int(torch.randint(0, width - wide, ()))
        shifted[index, :, y : y + tall, x : x + wide] = torch.randn(1, tall, wide)
    return shifted


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = sum(
        int((model(images[i : i + 200]).argmax(1) == labels[i : i + 200]).sum())
        for i in range(0, len(images), 200)
    )
    return right / len(images)


def save(model: torch.nn.Module, folder: Path, test_accuracy: float) -> None:
    """Write a timm hub folder, the layout of ``timm.models.save_for_hf``, with float16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": MODEL_ARGS["embed_dim"],
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [MEAN],
            "std": [STD],
            "num_classes": 10,
            "license": "mit",
        },
        "label_names": CLASSES,
        "test_accuracy": test_accuracy,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the four gzipped IDX files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--schedule", default="0.75:20,0.5:3,0:0.6", help="patch dropout:epochs, one after another"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_split(data: Path, name: str) -> tuple[np.ndarray, torch.Tensor]:
    """Return the images uint8[n, 28, 28] and labels int64[n] of "train" or "t10k"."""
    labels = read_idx(data / f"{name}-labels-idx1-ubyte.gz").astype(np.int64)
    return read_idx(data / f"{name}-images-idx3-ubyte.gz"), torch.from_numpy(labels)


class Trainer:
    """A model in training, its moving average, and how many steps it has taken."""

    def __init__(self, batch_size: int, rate: float, total: int) -> None:
        self.batch_size, self.total, self.step = batch_size, total, 0
        self.start = time.time()
        self.model = timm.create_model(ARCHITECTURE, patch_drop_rate=0.5, **MODEL_ARGS)
        self.average = ModelEmaV3(self.model, decay=0.9995, use_warmup=True)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=rate,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=total, pct_start=0.1, final_div_factor=100
        )

    def train(self, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
        """Take that many steps, epoch after epoch in a new order."""
        self.model.train()
        whole = len(images) // self.batch_size
        while steps:
            order = torch.randperm(len(images))
            for batch in order.split(self.batch_size)[: min(whole, steps)]:
                self._step(images[batch], labels[batch])
                steps -= 1

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(augment(images))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.average.update(self.model, self.step)
        self.step += 1
        if self.step % 100 == 0:
            seconds = time.time() - self.start
            print(f"{self.step}/{self.total} {seconds:.0f} s loss {loss:.3f}", flush=True)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    train_images, train_labels = read_split(args.data, "train")
    raw_test, test_labels = read_split(args.data, "t10k")
    images, test_images = normalize(train_images), normalize(raw_test)
    np.savez_compressed(
        args.output / "test_slice.npz",
        images=raw_test[:3000],
        labels=test_labels[:3000].numpy().astype(np.uint8),
        classes=np.array(CLASSES),
    )

    phases = [(float(d), float(e)) for d, e in (p.split(":") for p in args.schedule.split(","))]
    per_epoch = len(images) // args.batch_size
    steps = [int(epochs * per_epoch) for _, epochs in phases]
    trainer = Trainer(args.batch_size, args.lr, sum(steps))
    for (dropout, _), count in zip(phases, steps, strict=True):
        trainer.model.patch_drop.prob = dropout
        trainer.train(images, train_labels, count)
        test = accuracy(trainer.average.module, test_images[:2000], test_labels[:2000])
        print(f"patch dropout {dropout}: accuracy {test:.4f} (2,000 images)", flush=True)
        save(trainer.average.module, args.output / "vit", test)
    test = accuracy(trainer.average.module, test_images, test_labels)
    save(trainer.average.module, args.output / "vit", test)
    print(f"accuracy on 10,000 test images: {test:.4f}")


if __name__ == "__main__":
    main()
