"""The whole way through inductor: one layer, one model that decodes, and the step that generation compiles.

All other graph tests (law 9) stop at `aot_eager`, backward passes included: the graphs are the same, only the code that
they become is not, and a C++ compiler takes a minute for it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from megablocks import MegaLanguageModel, MovingAverageGatedAttention, generate, mega_decoder

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        settings.get_current_profile_name() == "dev", reason="a minute of C++; HYPOTHESIS_PROFILE=ci runs it"
    ),
    # Of torch's own making: inductor imports modules of torch that use what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@torch.no_grad()
def test_a_layer():
    torch._dynamo.reset()
    layer = MovingAverageGatedAttention(8, 4, ema=2, chunk_size=3)
    x, mask = torch.randn(2, 7, 8), torch.tensor([[False] * 7, [True] * 2 + [False] * 5])
    fast = torch.compile(layer, fullgraph=True, backend="inductor")
    torch.testing.assert_close(fast(x, padding_mask=mask), layer(x, padding_mask=mask))


@torch.no_grad()
def test_a_model_and_its_decoding_steps():
    torch._dynamo.reset()
    model = MegaLanguageModel(mega_decoder(1, 8, qk_dim=4, ema_dim=2, ffn_dim=12, chunk_size=3), 11).eval()
    tokens, outputs = torch.randint(11, (2, 7)), []
    fast, state = torch.compile(model, fullgraph=True, backend="inductor"), model.init_state(2)
    for token in tokens.split(1, dim=1):
        logits, state = fast(token, state=state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens))


def test_a_compiled_step_of_generation():
    torch._dynamo.reset()
    model = MegaLanguageModel(mega_decoder(1, 8, qk_dim=4, ema_dim=2, ffn_dim=12, chunk_size=3), 11)
    prompt = torch.randint(11, (2, 4))
    plain, compiled = (generate(model, prompt, max_new_tokens=5, compiled=way).tokens for way in (False, True))
    assert compiled.equal(plain)
