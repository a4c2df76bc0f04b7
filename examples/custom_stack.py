"""A stack of one's own: parts of megablocks put together as in no paper, trained on a small task, then streamed."""

import torch
from torch import Tensor, nn

from megablocks import MegaDecoder, MegaDecoderLayer, MovingAverageGatedAttention, MultiDimensionDampedEMA, RMSNorm

NOTES, WIDTH = 8, 32


class GatedFeedForward(nn.Module):
    """A part of one's own: it only has to be called like the part whose place it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        return x + self.down(nn.functional.glu(self.up(self.norm(x))))


class MyModel(nn.Module):
    """A moving average, attention in short chunks, attention in long chunks: each layer of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        near = MovingAverageGatedAttention(WIDTH, 16, ema=4, chunk_size=16, attention="laplace", norm="rmsnorm")
        far = MovingAverageGatedAttention(WIDTH, 32, ema=8, chunk_size=64, activation=torch.tanh)
        self.embedding, self.average = nn.Embedding(NOTES, WIDTH), MultiDimensionDampedEMA(WIDTH, 4)
        self.stack = MegaDecoder([near, MegaDecoderLayer(far, feed_forward=GatedFeedForward())], final_norm="rmsnorm")
        self.head = nn.Linear(WIDTH, NOTES)

    def forward(self, notes: Tensor) -> Tensor:
        return self.head(self.stack(self.average(self.embedding(notes))))

    def stream(self, notes: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        averages, stacked = state or (self.average.init_state(len(notes)), self.stack.init_state(len(notes)))
        x, averages = self.average(self.embedding(notes), state=averages)
        x, stacked = self.stack(x, state=stacked)
        return self.head(x), (averages, stacked)


torch.manual_seed(0)
model, melodies = MyModel(), (torch.randint(NOTES, (200, 16, 10)), torch.randint(5, 11, (200, 16, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step, (melody, length) in enumerate(zip(*melodies, strict=True), start=1):
    songs = melody.gather(1, torch.arange(49) % length)  # each row repeats a melody of its own, of 5 to 10 notes
    loss = nn.functional.cross_entropy(model(songs[:, :-1])[:, 20:].flatten(0, 1), songs[:, 21:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.3f} where the melody can be known", flush=True)

(first, state), whole = model.stream(songs[:, :7]), model(songs)
rest, state = model.stream(songs[:, 7:], state)
torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=1e-4, atol=1e-4)
right = (rest.argmax(-1)[:, 13:-1] == songs[:, 21:]).float().mean()
print(f"streamed in two pieces as in one pass; {right:.0%} of the notes right")
