"""Pure tensor functions: no `nn.Module`, no configuration.

The package's one legend of axis letters, lower case in einops patterns, upper case in comments and docstrings:

| letter | meaning                                    | argument     |
|--------|--------------------------------------------|--------------|
| B, L   | batch, length of this call                 |              |
| M      | length of the memory (encoder output)      |              |
| D      | model width                                | `embed_dim`  |
| N      | averages per channel                       | `ema_dim`    |
| Z      | shared query/key width                     | `qk_dim`     |
| V      | value and gate width                       | `value_dim`  |
| F      | feed-forward width                         | `ffn_dim`    |
| C, K   | chunk length, number of chunks             | `chunk_size` |
| S      | slots of a state's keys                    | `capacity`   |
"""

from megablocks.functional.attention import chunked_attention, streamed_attention
from megablocks.functional.attention_function import AttentionFunction, attention_function
from megablocks.functional.backends import ema_backend
from megablocks.functional.ema import damped_ema, ema_kernel
from megablocks.functional.position import rotary_bias, simple_bias
from megablocks.functional.sight import attend

__all__ = [
    "AttentionFunction",
    "attend",
    "attention_function",
    "chunked_attention",
    "damped_ema",
    "ema_backend",
    "ema_kernel",
    "rotary_bias",
    "simple_bias",
    "streamed_attention",
]
