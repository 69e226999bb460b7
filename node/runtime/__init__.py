"""The model runtime: engine, its host, the back end behind the port, the hardware below, and what is measured of it.

Importing anything of this package sets ``OMP_WAIT_POLICY=PASSIVE`` unless the operator has set it. It is here and nowhere else
because Python runs this file before any module below it, and only modules below it may import torch: OpenMP reads the variable
once, when torch's library is loaded. With its default, waiting threads spin, and on a machine where anything else runs torch
becomes 20 to 60 times slower. Child processes inherit it.

``THP_MEM_ALLOC_ENABLE=1`` stands beside it for the same reason: torch then asks for huge pages, and a decode step that reads
all weights and many blocks of the KV cache took 3 to 12 % less in three pairs of runs on an AMD EPYC.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
