"""transformers: pre-training with two heads, distillation, detection, and encoders under heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry, images

FAMILY = "transformers"
WORDS = 50
# The same few sizes go by different names.
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": WORDS, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def model(name: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**options))


class Tagger(nn.Module):
    """An encoder of text, with a head for each word and one for the sentence.

    The latter reads the encoder's pooler if it has one, else the first word.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.tags, self.topic = nn.Linear(16, 5), nn.Linear(16, 3)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        found = self.body(**inputs)
        pooled = found.get("pooler_output")
        words = found["last_hidden_state"]
        return {
            "tags": self.tags(words), "topic": self.topic(words[:, 0] if pooled is None else pooled)
        }  # fmt: skip


class Summariser(nn.Module):
    """An encoder and a decoder: the topic is read from the one, the next word from the other."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.topic = body, nn.Linear(16, 3)
        self.next = nn.Identity() if hasattr(body, "lm_head") else nn.Linear(16, WORDS)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        found = self.body(**inputs)
        words = found["logits"] if "logits" in found else found["last_hidden_state"]
        topic = self.topic(found["encoder_last_hidden_state"].mean(1))
        return {"topic": topic, "next": self.next(words)}


class Listener(nn.Module):
    """An encoder of sound, with a head for each frame and one for the speaker."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.letters, self.speaker = nn.Linear(16, 30), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        frames = self.body(x).last_hidden_state
        return {"letters": self.letters(frames), "speaker": self.speaker(frames.mean(1))}


def wrapped(wrapper: Callable[[nn.Module], nn.Module], name: str, **options: Any) -> nn.Module:
    return wrapper(model(f"{name}Model", f"{name}Config", **options))


def words(*shape: int) -> Tensor:
    shape = shape or (2, 8)
    return torch.randint(3, WORDS, shape, generator=torch.Generator().manual_seed(1))


def text(**more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": words(), "attention_mask": torch.ones(2, 8).long(), **more}


def both_texts() -> dict[str, Tensor]:
    return {"input_ids": words(), "decoder_input_ids": words(2, 5)}


def text_and_objects() -> dict[str, Tensor]:
    objects = images(4).reshape(2, 3, 16)
    return {"input_ids": words(), "visual_feats": objects, "visual_pos": objects[..., :4]}


def sound() -> Tensor:
    return images(16).reshape(2, -1)[:, :600]


def detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, num_labels=3,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def clip() -> nn.Module:
    vision = {**VISION, "num_channels": 3}
    return model("CLIPModel", "CLIPConfig", text_config=TINY, vision_config=vision,
                 projection_dim=8)  # fmt: skip


def gpt2_options() -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D  # a linear layer, the other way round

    return {"task_outputs": ["logits", "mc_logits"], "prunable": {Conv1D: "weight"}}


def entry(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    expected: dict[str, Any],
    *tasks: str,
    **rest: Any,
) -> Entry:
    options = {"task_outputs": list(tasks)} if tasks else {}
    return Entry(name, FAMILY, make, inputs, expected, "transformers", options, **rest)


def tagger(name: str, topic: tuple[str, ...] = (), **options: Any) -> Entry:
    """`topic` has the parts of the encoder that serve the sentence alone."""
    return entry(
        f"{name} tagger", partial(wrapped, Tagger, name, **{**TINY, **options}), text,
        {"shared": ("body",), "tags": ("tags",), "topic": ("topic", *topic)},
    )  # fmt: skip


ENTRIES = (
    # The embedding is a prunable weight because it is tied to the decoder of the words, and both
    # tasks read it; the pooler serves the second task alone.
    entry(
        "BertForPreTraining", partial(model, "BertForPreTraining", "BertConfig", **TINY), text,
        {
            "shared": ("bert",),
            "prediction_logits": ("cls.predictions",),
            "seq_relationship_logits": ("bert.pooler", "cls.seq_relationship"),
        },
    ),
    entry(
        "BertForPreTraining untied",
        partial(
            model, "BertForPreTraining", "BertConfig", **TINY, tie_word_embeddings=False
        ),
        text,
        {
            "shared": ("bert",),
            "prediction_logits": ("cls.predictions",),
            "seq_relationship_logits": ("bert.pooler", "cls.seq_relationship"),
        },
    ),
    # One layer, run twice.
    entry(
        "AlbertForPreTraining",
        partial(model, "AlbertForPreTraining", "AlbertConfig", **TINY, embedding_size=8), text,
        {
            "shared": ("albert",),
            "prediction_logits": ("predictions",),
            "sop_logits": ("albert.pooler", "sop_classifier"),
        },
    ),
    # The two ends are two rows of one layer.
    entry(
        "BertForQuestionAnswering",
        partial(model, "BertForQuestionAnswering", "BertConfig", **TINY), text,
        {"shared": ("bert", "qa_outputs")},
    ),
    Entry(
        "GPT2DoubleHeadsModel", FAMILY,
        partial(
            model, "GPT2DoubleHeadsModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2,
            n_positions=16, vocab_size=WORDS,
        ),
        lambda: {"input_ids": words(2, 2, 8), "mc_token_ids": torch.tensor([[3, 7], [7, 2]])},
        {"shared": ("transformer",), "mc_logits": ("multiple_choice_head",)},
        "transformers", gpt2_options,
    ),
    tagger("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    tagger("Roberta", ("body.pooler",)),
    tagger("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    tagger("ModernBert", local_attention=4),
    tagger("Llama", num_key_value_heads=1),
    tagger("Mamba", state_size=4),
    # The topic needs the encoder only, which the next word needs too.
    entry(
        "Bart summariser",
        partial(
            wrapped, Summariser, "Bart", d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, vocab_size=WORDS, max_position_embeddings=16,
        ),
        both_texts,
        {"shared": ("body.encoder",), "next": ("body.decoder", "next"), "topic": ("topic",)},
    ),
    # The words of both, and the layer that predicts the next, are one tied weight.
    entry(
        "T5 summariser",
        lambda: Summariser(
            model(
                "T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=32,
                num_layers=2, num_heads=2, vocab_size=WORDS,
            )
        ),
        both_texts,
        {"shared": ("body.shared", "body.encoder"), "next": ("body.decoder",),
         "topic": ("topic",)},
    ),
    # Three cross-modal outputs. Of the last cross layer only the side of the language is read.
    entry(
        "LxmertForPreTraining",
        partial(
            model, "LxmertForPreTraining", "LxmertConfig", **TINY, l_layers=1, x_layers=2,
            r_layers=1, visual_feat_dim=16, task_obj_predict=False, num_qa_labels=4,
        ),
        text_and_objects,
        {
            "shared": ("lxmert",),
            "prediction_logits": ("cls.predictions",),
            "cross_relationship_score+question_answering_score": ("lxmert.pooler",),
            "cross_relationship_score": ("cls.seq_relationship",),
            "question_answering_score": ("answer_head",),
            "unused": ("lxmert.encoder.x_layers.1.visn_*",),
        },
    ),
    # The third output is the mean of the other two.
    *(
        entry(
            f"{name}ForImageClassificationWithTeacher", make, inputs,
            {
                "shared": (body,),
                "logits+cls_logits": (heads[0],),
                "logits+distillation_logits": (heads[1],),
            },
        )
        for name, make, inputs, body, heads in (
            (
                "DeiT",
                partial(
                    model, "DeiTForImageClassificationWithTeacher", "DeiTConfig", **VISION
                ),
                images, "deit", ("cls_classifier", "distillation_classifier"),
            ),
            (
                "Levit",
                partial(
                    model, "LevitForImageClassificationWithTeacher", "LevitConfig",
                    image_size=64, hidden_sizes=[16, 32, 32], num_attention_heads=[2, 2, 2],
                    depths=[1, 1, 1], key_dim=[8, 8, 8],
                ),
                partial(images, 64), "levit", ("classifier", "classifier_distill"),
            ),
        )
    ),
    entry(
        "YolosForObjectDetection",
        partial(
            model, "YolosForObjectDetection", "YolosConfig",
            **{**VISION, "image_size": [32, 32]}, num_detection_tokens=5,
        ),
        images,
        {
            "shared": ("vit",), "logits": ("class_labels_classifier",),
            "pred_boxes": ("bbox_predictor",),
        },
        "logits", "pred_boxes",
    ),
    # Made for a pretrained backbone, of which it freezes all but what it finds under `stage.1` to
    # `stage.3`: in transformers' own ResNet these are `stages.1` and so on, and all is frozen.
    entry(
        "DetrForObjectDetection", detr, partial(images, 64),
        {
            "frozen": ("model.backbone",), "shared": ("model",),
            "logits": ("class_labels_classifier",), "pred_boxes": ("bbox_predictor",),
        },
        "logits", "pred_boxes", ignored=("most of the prunable weights are frozen",),
    ),
    # Two towers: nothing is shared as long as each embedding is a task of its own.
    entry(
        "CLIPModel", clip,
        lambda: {"pixel_values": images(), "input_ids": words()},
        {
            "image_embeds": ("vision_model", "visual_projection"),
            "text_embeds": ("text_model", "text_projection"),
        },
        "image_embeds", "text_embeds",
    ),
    # Training drops half of its layers at random. Its convolution over positions is weight-
    # normalised, so that there is no one weight to prune.
    entry(
        "Wav2Vec2 listener",
        partial(
            wrapped, Listener, "Wav2Vec2", **TINY, conv_dim=(8, 8), conv_kernel=(8, 4),
            conv_stride=(4, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            layerdrop=0.5, mask_time_prob=0.0,
        ),
        sound,
        {"shared": ("body",), "letters": ("letters",), "speaker": ("speaker",)},
    ),
)  # fmt: skip
