"""Shapes of the parameters of models that people train, in the order of `model.parameters()`."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """161 parameters, 25 557 032 weights (He et al. 2015)."""

    def norm(channels: int) -> Shapes:
        return [(channels,), (channels,)]

    shapes: Shapes = [(64, 3, 7, 7), *norm(64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += [
                (width, channels, 1, 1),
                *norm(width),
                (width, width, 3, 3),
                *norm(width),
                (out, width, 1, 1),
                *norm(out),
            ]
            if block == 0:
                shapes += [(out, channels, 1, 1), *norm(out)]
            channels = out
    return [*shapes, (1000, 2048), (1000,)]


def _linear(inputs: int, outputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def vit_large() -> Shapes:
    """ViT-L/16 at 224 pixels (Dosovitskiy et al. 2020), as in transformers: 392 parameters, 304 326 632 weights."""
    width = 1024
    norm: Shapes = [(width,), (width,)]
    layer = [*_linear(width, width) * 4, *norm, *norm, *_linear(width, 4 * width), *_linear(4 * width, width)]
    embedding: Shapes = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*embedding, *layer * 24, *norm, *_linear(width, 1000)]


def bert_base() -> Shapes:
    """BERT-base, uncased (Devlin et al. 2018), with its pooler: 199 parameters, 109 482 240 weights."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    layer = [*_linear(width, width) * 4, *norm, *_linear(width, 4 * width), *_linear(4 * width, width), *norm]
    return [(30522, width), (512, width), (2, width), *norm, *layer * 12, *_linear(width, width)]


LLAMA_8B_LAYERS = 32


def llama_8b(layers: int = LLAMA_8B_LAYERS) -> Shapes:
    """Llama 3 8B (Grattafiori et al. 2024): 291 parameters, 8 030 261 248 weights; or only its first layers."""
    width, key_width, hidden, vocabulary = 4096, 1024, 14336, 128256
    attention: Shapes = [(width, width), (key_width, width), (key_width, width), (width, width)]
    layer = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (vocabulary, width)]
