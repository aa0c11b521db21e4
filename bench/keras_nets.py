"""The matrix' networks in Keras: `python -m bench.keras_nets NETWORK PLACE` saves one, in a process of its own.

PLACE ends in .keras, or is the folder of a SavedModel; KERAS_BACKEND says what Keras runs on. Channels last, as Keras
has them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SHAPE = (16, 16, 1)


def networks() -> dict[str, Any]:
    """By name, a function that builds it."""
    return {"cnn": _cnn, "depthwise": _depthwise, "transformer": _transformer}


def _cnn() -> Any:
    from keras import Input, Model, layers

    image = Input(SHAPE, name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="stem_norm")(x))
    for index, width in enumerate((8, 16, 32)):
        stride = 1 if index == 0 else 2
        y = layers.Conv2D(width, 3, stride, padding="same", use_bias=False, name=f"first{index}")(x)
        y = layers.ReLU()(layers.BatchNormalization(name=f"first{index}_norm")(y))
        y = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"second{index}")(y)
        y = layers.BatchNormalization(name=f"second{index}_norm")(y)
        skip = layers.Conv2D(width, 1, stride, name=f"skip{index}")(x)
        x = layers.ReLU()(layers.Add(name=f"sum{index}")([y, skip]))
    return Model(image, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(x)))


def _depthwise() -> Any:
    from keras import Input, Model, layers

    image = Input(SHAPE, name="image")
    x = layers.Conv2D(12, 3, padding="same", use_bias=False, name="stem")(image)
    x = layers.Activation("hard_swish")(layers.BatchNormalization(name="stem_norm")(x))
    for index, (width, stride) in enumerate(((12, 1), (20, 2), (20, 1), (32, 2))):
        wide = 3 * x.shape[-1]
        y = layers.Conv2D(wide, 1, use_bias=False, name=f"expand{index}")(x)
        y = layers.Activation("hard_swish")(layers.BatchNormalization(name=f"expand{index}_norm")(y))
        y = layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False, name=f"depth{index}")(y)
        y = layers.Activation("hard_swish")(layers.BatchNormalization(name=f"depth{index}_norm")(y))
        gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
        gate = layers.Conv2D(max(4, wide // 4), 1, activation="relu", name=f"squeeze{index}")(gate)
        gate = layers.Conv2D(wide, 1, activation="hard_sigmoid", name=f"excite{index}")(gate)
        y = layers.Conv2D(width, 1, use_bias=False, name=f"project{index}")(layers.Multiply()([y, gate]))
        y = layers.BatchNormalization(name=f"project{index}_norm")(y)
        x = layers.Add()([x, y]) if x.shape == y.shape else y
    return Model(image, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(x)))


def _transformer() -> Any:
    from keras import Input, Model, layers

    image = Input(SHAPE, name="image")
    x = layers.Reshape((16, 48))(layers.Conv2D(48, 4, 4, name="patches")(image))
    for block in range(4):
        y = layers.LayerNormalization(epsilon=1e-5, name=f"before{block}")(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 12, name=f"attend{block}")(y, y)])
        y = layers.LayerNormalization(epsilon=1e-5, name=f"between{block}")(x)
        y = layers.Dense(192, activation="gelu", name=f"up{block}")(y)
        x = layers.Add()([x, layers.Dense(48, name=f"down{block}")(y)])
    x = layers.LayerNormalization(epsilon=1e-5, name="after")(x)
    return Model(image, layers.Dense(10, name="head")(layers.GlobalAveragePooling1D()(x)))


def save(network: str, place: Path) -> None:
    """Statistics of batch normalisation are those of noise that looks like the data's."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = networks()[network]()
    model(np.random.default_rng(3).random((32, *SHAPE), np.float32))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(np.random.default_rng(3).random((64, *SHAPE), np.float32), training=True)
    if place.suffix == ".keras":
        model.save(place)
    else:
        model.export(place, verbose=False)


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
