"""Keras networks with known outputs. Runs in a process of its own, where Keras is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 3


def networks() -> dict[str, Any]:
    import keras
    from keras import Input, Model, Sequential, layers

    image = Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(image)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(x))
    y = layers.Conv2D(8, 3, padding="same", name="inner")(x)
    x = layers.Activation("relu")(layers.Add(name="sum")([x, layers.BatchNormalization(name="inner_bn")(y)]))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="down")(x)
    x = layers.GlobalAveragePooling2D()(layers.Dropout(0.3, name="drop")(layers.MaxPooling2D()(x)))
    cnn = Model(image, layers.Dense(10, name="head")(x))

    depthwise = Sequential(
        [
            Input((15, 16, 3)),
            layers.Rescaling(1 / 255.0),
            layers.ZeroPadding2D(((0, 1), (2, 1))),
            layers.Conv2D(8, 3, strides=2, name="stem"),
            layers.BatchNormalization(name="stem_bn"),
            layers.ReLU(6.0),
            layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="by_depth"),
            layers.BatchNormalization(scale=False, name="by_depth_bn"),
            layers.Activation("hard_swish"),
            layers.SeparableConv2D(12, 3, strides=2, padding="same", name="separable"),
            layers.LeakyReLU(),
            layers.AveragePooling2D(2, padding="same"),
            layers.Conv2DTranspose(8, 3, strides=2, padding="same", name="up"),
            layers.Conv2DTranspose(4, 3, strides=2, name="up_valid"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax", name="head"),
        ]
    )

    tokens = Input((8,), dtype="int32", name="tokens")
    x = layers.Embedding(50, 16, name="embed")(tokens)
    for block in range(2):
        h = layers.LayerNormalization(epsilon=1e-6, name=f"norm{block}")(x)
        h = layers.MultiHeadAttention(2, 8, dropout=0.1, name=f"attend{block}")(
            h, h, use_causal_mask=bool(block)
        )
        x = x + h
        h = layers.Dense(32, activation="gelu", name=f"wide{block}")(
            layers.LayerNormalization(name=f"next{block}")(x)
        )
        x = layers.Add()([x, layers.Dense(16, name=f"narrow{block}")(h)])
    transformer = Model(tokens, layers.Dense(5, name="head")(layers.GlobalAveragePooling1D()(x)))

    frames = Input((4, 6), name="frames")
    x = layers.Bidirectional(layers.LSTM(8, return_sequences=True), name="both")(frames)
    x = layers.TimeDistributed(layers.Dense(6), name="each")(
        layers.GRU(8, return_sequences=True, name="gru")(x)
    )
    last = [layers.LSTM(4, name="lstm")(x), layers.GRU(4, reset_after=False, name="old")(x)]
    last.append(layers.SimpleRNN(4, name="plain")(x))
    recurrent = Model(frames, [layers.Dense(3, name="head")(layers.Concatenate()(last)), last[0]])

    words = Input((4,), dtype="int32", name="words")
    x = layers.LSTM(4, return_sequences=True, name="lstm")(
        layers.Embedding(50, 6, mask_zero=True, name="embed")(words)
    )
    masked = Model(words, layers.Dense(3, name="head")(layers.GRU(4, name="gru")(x)))

    keras.config.set_dtype_policy("mixed_float16")
    mixed = Sequential(
        [Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"), layers.Flatten(), layers.Dense(3)]
    )
    keras.config.set_dtype_policy("float32")
    found = {"cnn": cnn, "depthwise": depthwise, "transformer": transformer, "recurrent": recurrent}
    return found | {"masked": masked, "mixed": mixed}


def randomized(model: Any, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype != "float32":
            continue
        value = rng.normal(size=variable.shape) / np.sqrt(max(1, np.prod(variable.shape[:-1])))
        if "variance" in variable.path or "gamma" in variable.path:
            value = np.abs(value) + 0.5
        variable.assign(value.astype("float32"))


def example(model: Any) -> Any:
    rng = np.random.default_rng(1)
    shape = (SAMPLES, *model.inputs[0].shape[1:])
    if "int" not in str(model.inputs[0].dtype):
        return rng.normal(size=shape).astype("float32")
    ids = rng.integers(1, 50, shape).astype("int32")
    ids[0, -2:] = 0  # what is masked, where a network masks
    return ids


def write(folder: str, convert: bool) -> list[str]:
    """Each network as NAME.keras, its inputs and outputs as NAME.npz, and where asked its graph as NAME.pt2."""
    made = networks()
    for name, model in made.items():
        randomized(model)
        path = Path(folder) / f"{name}.keras"
        model.save(path)
        x = example(model)
        outputs = model(x)
        every = outputs if isinstance(outputs, list) else [outputs]
        arrays = {f"y{i}": np.asarray(y.detach().float().numpy()) for i, y in enumerate(every)}
        np.savez(path.with_suffix(".npz"), x=x, **arrays)
        if convert:
            from bitport.frontends.keras._network import convert as to_graph

            to_graph(str(path), str(path.with_suffix(".pt2")), None, "batch", "refuse")
    return list(made)
