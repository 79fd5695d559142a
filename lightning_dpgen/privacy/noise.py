"""The SECRET stream of randomness: noise, Poisson masks, shard permutations.

Amplification by sampling and the noise itself are void when a seed is public, so this stream is seeded by the operating
system, never by ``seed_everything``, and can be neither pickled nor copied.
"""

from __future__ import annotations

import os
import secrets
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SOURCES = {
    "pcg64dxsm": "numpy PCG64DXSM, 256 bits of operating-system entropy, float64 (statistical, not cryptographic)",
    "aes-ctr": "AES-256-CTR keystream, 256-bit operating-system key, Box-Muller in float64",
    "device": "torch CUDA Philox, a fresh 64-bit operating-system seed per draw, float64 (statistical, not cryptographic); masks: "
    "numpy PCG64DXSM",
}


class _AesUniform:
    """Uniform numbers in (0, 1) from an AES-256-CTR keystream."""

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise ImportError("secure_noise=True needs the package `cryptography`: pip install 'lightning-dpgen[secure]'.") from error
        self._stream = Cipher(algorithms.AES(secrets.token_bytes(32)), modes.CTR(secrets.token_bytes(16))).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


class SecretStream:
    """Random numbers that nobody may be able to repeat.

    Args:
        secure: Draw from AES-CTR (needs the extra ``secure``) instead of numpy's PCG64DXSM. Sampling masks too.

    Privacy:
        Every released number rests on this stream. PCG64DXSM has 256 bits of seed: the noise cannot be searched for as it
        could with torch's 32-bit CPU seeds. It is not cryptographically strong, and neither source hides the discreteness
        of floating point; the certificate says so.
    """

    def __init__(self, secure: bool = False) -> None:
        self.secure = secure
        self._seed()

    def _seed(self) -> None:
        self._pid = os.getpid()
        if self.secure:
            self._aes = _AesUniform()
        else:
            sequence = np.random.SeedSequence(secrets.randbits(256), pool_size=8)
            self._numpy = np.random.Generator(np.random.PCG64DXSM(sequence))

    def _fresh_after_fork(self) -> None:
        if os.getpid() != self._pid:
            self._seed()

    def source(self, device: torch.device) -> str:
        """Where the noise on ``device`` and the masks come from, in words, for the certificate."""
        return SOURCES["aes-ctr" if self.secure else "device" if device.type == "cuda" else "pcg64dxsm"]

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``count`` independent uniform numbers in [0, 1)."""
        self._fresh_after_fork()
        return self._aes.uniform(count) if self.secure else self._numpy.random(count)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniformly random order of ``0 … count - 1``."""
        return np.argsort(self.uniform(count), kind="stable").astype(np.int64)

    def normal(self, shape: torch.Size, std: float, device: torch.device) -> Tensor:
        """Independent N(0, std²) numbers as a float64 tensor of ``shape``.

        On CUDA they are drawn on the device from a fresh 64-bit operating-system seed; elsewhere on the CPU.

        Privacy:
            Fresh at every call: two calls never share a seed.
        """
        self._fresh_after_fork()
        if device.type == "cuda" and not self.secure:
            generator = torch.Generator(device).manual_seed(_signed(secrets.randbits(64)))
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float64) * std
        count = shape.numel()
        if self.secure:
            half = (count + 1) // 2
            radius = np.sqrt(-2.0 * np.log(self._aes.uniform(half)))
            angle = 2.0 * np.pi * self._aes.uniform(half)
            values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        else:
            values = self._numpy.standard_normal(count)
        values *= std
        noise = torch.from_numpy(values).reshape(shape)
        return noise if device.type in ("cpu", "mps") else noise.to(device)

    def __reduce__(self) -> NoReturn:
        raise TypeError("SecretStream cannot be pickled or copied: a saved seed would make every release repeatable.")


def _signed(word: int) -> int:
    """A 64-bit word as the signed number that torch takes for a seed."""
    return word - 2**64 if word >= 2**63 else word
