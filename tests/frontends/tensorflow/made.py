"""TensorFlow networks with known outputs. Runs in a process of its own, where TensorFlow is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write(folder: str) -> None:
    """Each network as a SavedModel NAME and, where LiteRT can hold it, NAME.tflite; inputs and outputs as .npz."""
    import tensorflow as tf
    from keras import Input, Model, layers
    from tests.frontends.keras.made import example, networks, randomized

    made = {name: net for name, net in networks().items() if name in ("cnn", "depthwise", "transformer")}
    frames = Input((4, 6), name="frames")
    made["lstm"] = Model(
        frames, layers.Dense(3)(layers.LSTM(8)(layers.LSTM(8, return_sequences=True)(frames)))
    )
    gates = layers.GRU(8, return_sequences=True)(
        layers.GRU(8, reset_after=False, return_sequences=True)(frames)
    )
    made["gru"] = Model(frames, layers.Dense(3)(layers.Bidirectional(layers.GRU(5))(gates)))
    for name, model in made.items():
        randomized(model)
        place = Path(folder) / name
        x = example(model)
        model.export(place, verbose=False)
        y = tf.saved_model.load(place).signatures["serving_default"](tf.constant(x))
        np.savez(place.with_suffix(".npz"), x=x, y=next(iter(y.values())).numpy())
        if name in ("lstm", "gru"):
            continue
        converter = tf.lite.TFLiteConverter.from_saved_model(str(place))
        _tflite(tf, place.with_name(f"{name}_float.tflite"), converter.convert(), x)
        if name == "cnn":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda x=x: ([x[:1] * scale] for scale in (0.5, 1.0, 1.5))
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            _tflite(tf, place.with_name(f"{name}_int8.tflite"), converter.convert(), x)


def _tflite(tf: Any, path: Path, data: bytes, x: Any) -> None:
    path.write_bytes(data)
    interpreter = tf.lite.Interpreter(model_content=data)
    given = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(given, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given, x)
    interpreter.invoke()
    np.savez(
        path.with_suffix(".npz"), x=x, y=interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    )


def hostile(folder: str) -> None:
    """SavedModels that would run or write something: `python`, `reads`, `writes`."""
    import tensorflow as tf

    def python(x: Any) -> Any:
        return tf.ensure_shape(tf.numpy_function(lambda a: a, [x], tf.float32), [None, 4])

    def reads(x: Any) -> Any:
        return x + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)

    def writes(x: Any) -> Any:
        tf.io.write_file(str(Path(folder) / "written"), "here")
        return x * 2.0

    for function in (python, reads, writes):
        module = tf.Module()
        module.run = tf.function(function, input_signature=[tf.TensorSpec([None, 4])])
        tf.saved_model.save(module, str(Path(folder) / function.__name__), signatures=module.run)
