"""Orthogonal matrices that spread one channel's outliers over all, and can be merged into the weights around them.

    Q = T · diag(s)        T orthonormal with entries of one size, s random signs: a channel of outliers a·e_j becomes
                           ±a/√C in every channel, and what is spread already stays so
    R = Q − 2u(uᵀQ)/uᵀu    u = Q1/√C − 1/√C (a Householder reflection): R1 = 1, so the mean over channels stays what it
                           is, R commutes with its subtraction and so with LayerNorm without gain and bias. R's entries
                           differ from Q's by about 1/C.

T is a Hadamard matrix over √C where one is at hand: Sylvester's doubling of 1 or of one of Paley's (12, 20, 28, …).
For other C it is the Kronecker product of the largest with the discrete Hartley transform, cos + sin, whose entries
reach √2/√C: orthogonal for every size, and nothing to draw.

Sources: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 3; Liu et al. 2024, SpinQuant, arXiv:2405.16406;
Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024, section 3.1, of LayerNorm (which takes the mean out of the layers
before instead, and needs an RMSNorm for it); Paley 1933, On orthogonal matrices, lemmas 2 and 3; Bracewell 1983.

Legend: C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitport.errors import WeightsError


def rotation(signs: Tensor, keeps_ones: bool) -> Tensor:
    """R, orthogonal, float64 [C, C]; the same for the same signs.

    Args:
        signs: 1 or −1, [C].
        keeps_ones: R1 = 1, as LayerNorm wants it.

    Raises WeightsError where signs are no list of 1 and −1.
    """
    if signs.dim() != 1 or not signs.numel() or not bool((signs.abs() == 1).all()):
        raise WeightsError(
            f"signs of shape {tuple(signs.shape)}: a rotation is made of one 1 or −1 a channel"
        )
    made = spreading(len(signs)) * signs.double()
    if not keeps_ones:
        return made
    one = torch.full((len(signs),), len(signs) ** -0.5, dtype=torch.float64)
    u = made @ one - one
    length = u @ u
    return made if length == 0 else made - torch.outer(u, u @ made) * (2 / length)


def random_signs(size: int, seed: int) -> Tensor:
    """1 or −1, int8 [size], by a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (size,), generator=generator) - 1).to(torch.int8)


def turned(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The tensor with R [C, C] applied along an axis of size C, in float64; shape and type stay.

    A layer that writes W x + b into rotated channels has R applied along the outputs of W and b; one that reads them,
    W Rᵀ, along its inputs.
    """
    last = tensor.detach().double().movedim(axis, -1)
    return (last @ matrix.to(last.device).T).movedim(-1, axis).contiguous().to(tensor.dtype)


# ------------------------------------------------------------------------------------------------ the matrix


def spreading(size: int) -> Tensor:
    """T, orthonormal, float64 [size, size]: no entry larger than √(2/size), all of one size where C allows it."""
    rest = next(rest for rest in range(1, size + 1) if size % rest == 0 and has_hadamard(size // rest))
    return torch.kron(_hadamard(size // rest), _hartley(rest)) / math.sqrt(size)


def has_hadamard(order: int) -> bool:
    """Whether a Hadamard matrix of an order is made here: 1, 2, Paley's, and their doubles."""
    return order in (1, 2) or _paley_prime(order) is not None or (order % 4 == 0 and has_hadamard(order // 2))


def _hadamard(order: int) -> Tensor:
    """Entries 1 and −1, rows orthogonal, float64."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2 or (order % 4 == 0 and has_hadamard(order // 2)):
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), _hadamard(order // 2))
    prime = _paley_prime(order)
    assert prime is not None, f"no Hadamard matrix of order {order}"
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[1:, 1:] = _residues(prime)
    core[0, 1:] = 1
    if order == prime + 1:  # lemma 2: the core is skew
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.float64)
    core[1:, 0] = 1  # lemma 3: the core is symmetric
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), zero)


def _paley_prime(order: int) -> int | None:
    """q of Paley's construction of an order: order − 1 ≡ 3, or order/2 − 1 ≡ 1, modulo 4."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else None


def _residues(prime: int) -> Tensor:
    """χ(i − j) modulo a prime, float64 [q, q]: 1 for squares, −1 for others, 0 on the diagonal."""
    index = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[index * index % prime] = 1.0
    character[0] = 0.0
    return character[(index[:, None] - index[None, :]) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _hartley(size: int) -> Tensor:
    """cos(2πij/n) + sin(2πij/n), float64: symmetric, its square n times the identity."""
    index = torch.arange(size)
    angle = (index[:, None] * index[None, :] % size).double() * (2 * math.pi / size)
    return angle.cos() + angle.sin()
