"""Architectures of Hugging Face transformers as they are, from small configurations, with random weights.

Each builder returns (model in eval mode, a function from a batch size to its keyword inputs). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Family = tuple[nn.Module, Callable[[int], Inputs]]

VOCABULARY = 64
LENGTH = 8
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _images(size: int = 32) -> Callable[[int], Inputs]:
    return lambda count: {"pixel_values": torch.randn(count, 3, size, size)}


def _tokens(count: int) -> Inputs:
    """Token ids and an attention mask: every second sample is padded at its end."""
    mask = torch.ones(count, LENGTH, dtype=torch.long)
    mask[1::2, LENGTH - 3 :] = 0
    return {"input_ids": torch.randint(1, VOCABULARY, (count, LENGTH)), "attention_mask": mask}


def _vision(name: str, size: int = 32, **options: Any) -> Family:
    return _made(f"{name}ForImageClassification", f"{name}Config", **options), _images(size)


def _text(name: str, head: str = "ForSequenceClassification", **options: Any) -> Family:
    return _made(f"{name}{head}", f"{name}Config", vocab_size=VOCABULARY, **options), _tokens


def _made(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    for parameter in built.parameters():  # a new transformer's biases and small weights hide mistakes
        if parameter.dim() < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for module in built.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return built.eval()


def _whisper() -> Family:
    import transformers

    model = _made(
        "WhisperForAudioClassification", "WhisperConfig", d_model=32, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20, classifier_proj_size=16,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32, vocab_size=VOCABULARY, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    assert isinstance(model, transformers.WhisperForAudioClassification)
    return model, lambda count: {"input_features": torch.randn(count, 16, 40)}


def _answers(count: int) -> Inputs:
    """What an encoder reads and what a decoder has written so far."""
    return {**_tokens(count), "decoder_input_ids": torch.randint(1, VOCABULARY, (count, 6))}


def _bart() -> Family:
    model = _made(
        "BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=32, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    return model, _answers


def _siglip() -> Family:
    text = {
        **WIDE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
        "projection_size": 32,
    }
    vision = {**WIDE, "image_size": 32, "patch_size": 8}
    model = _made("SiglipModel", "SiglipConfig", text_config=text, vision_config=vision)
    return model, lambda count: {**_tokens(count), **_images()(count)}


def _t5() -> Family:
    model = _made(
        "T5EncoderModel", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return model, _tokens


def _wav2vec2() -> Family:
    model = _made(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **WIDE, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, num_feat_extract_layers=3,
        classifier_proj_size=16, vocab_size=VOCABULARY, mask_time_length=2, mask_time_prob=0.0,
    )  # fmt: skip
    return model, lambda count: {"input_values": torch.randn(count, 800)}


VISION: dict[str, Callable[[], Family]] = {
    "resnet": lambda: _vision(
        "ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck"
    ),
    "mobilenet_v1": lambda: _vision("MobileNetV1", depth_multiplier=0.25),
    "mobilenet_v2": lambda: _vision("MobileNetV2", depth_multiplier=0.25),
    "efficientnet": lambda: _vision(
        "EfficientNet", width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, image_size=32
    ),
    "convnext": lambda: _vision("ConvNext", hidden_sizes=[16, 32], depths=[1, 2], num_stages=2),
    "vit": lambda: _vision("ViT", **WIDE, image_size=32, patch_size=8),
    "deit": lambda: _vision("DeiT", **WIDE, image_size=32, patch_size=8),
    "swin": lambda: _vision(
        "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "beit": lambda: _vision("Beit", **WIDE, image_size=32, patch_size=8, use_relative_position_bias=True),
}

VISION |= {
    "segformer": lambda: (
        _made("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
              num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, num_labels=5), _images(64),
    ),
    "dinov2": lambda: _vision("Dinov2", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32,
                              patch_size=8),
    "swinv2": lambda: _vision(
        "Swinv2", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "mobilevitv2": lambda: _vision("MobileViTV2", 64, image_size=64, width_multiplier=0.25),
    "siglip_vision": lambda: (
        _made("SiglipVisionModel", "SiglipVisionConfig", **{**WIDE, "num_hidden_layers": 1}, image_size=32,
              patch_size=8), _images(),
    ),
}  # fmt: skip

SEQUENCES: dict[str, Callable[[], Family]] = {
    "bert": lambda: _text("Bert", **WIDE, max_position_embeddings=32),
    "distilbert": lambda: _text("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32),
    "roberta": lambda: _text("Roberta", **WIDE, max_position_embeddings=40, pad_token_id=0),
    "albert": lambda: _text("Albert", **WIDE, embedding_size=16, max_position_embeddings=32),
    "gpt2": lambda: _text("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
                          eos_token_id=0, use_cache=False),
    "llama": lambda: _text("Llama", "ForCausalLM", **WIDE, num_key_value_heads=2, max_position_embeddings=32,
                           use_cache=False),
    "qwen3": lambda: _text("Qwen3", "ForCausalLM", **WIDE, num_key_value_heads=2, head_dim=8,
                           max_position_embeddings=32, use_cache=False),
    "mixtral": lambda: _text("Mixtral", "ForCausalLM", **WIDE, num_key_value_heads=2, num_local_experts=4,
                             num_experts_per_tok=2, max_position_embeddings=32, use_cache=False),
    "qwen3_moe": lambda: _text("Qwen3Moe", "ForCausalLM", **WIDE, num_key_value_heads=2, head_dim=8, num_experts=4,
                               num_experts_per_tok=2, moe_intermediate_size=32, max_position_embeddings=32,
                               use_cache=False),
    "gpt_oss": lambda: _text("GptOss", "ForCausalLM", **WIDE, num_key_value_heads=2, head_dim=8, num_local_experts=4,
                             num_experts_per_tok=2, sliding_window=4, max_position_embeddings=32, use_cache=False),
    "deberta_v2": lambda: _text("DebertaV2", **{**WIDE, "num_hidden_layers": 1}, max_position_embeddings=32,
                                relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
                                norm_rel_ebd="layer_norm", share_att_key=True, pooler_hidden_size=32),
    "mamba2": lambda: _text("Mamba2", "ForCausalLM", hidden_size=32, num_hidden_layers=1, state_size=4, num_heads=8,
                            head_dim=8, n_groups=2, chunk_size=4, use_cache=False),
    "bart": _bart,
    "siglip": _siglip,
    "t5_encoder": _t5,
    "whisper_encoder": _whisper,
    "wav2vec2": _wav2vec2,
}  # fmt: skip

FAMILIES = {**VISION, **SEQUENCES}


def build(name: str, seed: int = 0) -> Family:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[name]()
