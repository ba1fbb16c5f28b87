"""Configuration of NewGPT (`longmem.official.newgpt`), the backbone of LongMem's released code.

In a file of its own because the shape checks of the tests, which wrap every class of `longmem.backbone`, do not get along
with the checks of a strict configuration.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


@strict
class NewGPTConfig(PreTrainedConfig):
    """Configuration of a NewGPT model; the defaults are the released backbone's, as far as its code fixes them.

    Args:
        hidden_size: width; a multiple of `num_attention_heads`, of which ALiBi gives each a slope of its own.
        intermediate_size: width of the MLP; None for four times `hidden_size`.
        hidden_act: activation of the MLP; "gelu_new" is the tanh form.
        layer_norm_eps: of every layer norm.
        attention_dropout, hidden_dropout: on local attention weights and on the MLP's output, in training mode.
        initializer_range: standard deviation of new weights.
    """

    model_type: ClassVar[str] = "newgpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 50265
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check what the modules could not be built from."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be an activation of transformers (`ACT2FN`), got {self.hidden_act!r}.")
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be False: the LM head of NewGPT has weights of its own.")
