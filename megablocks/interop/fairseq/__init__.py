"""Checkpoints of the original code, a fairseq fork: in, out, and what they hold.

python -m megablocks.interop.fairseq checkpoint_best.pt directory        # then megablocks.load("directory")
"""

from megablocks.interop.fairseq.architecture import load_checkpoint
from megablocks.interop.fairseq.names import convert, export

__all__ = ["convert", "export", "load_checkpoint"]
