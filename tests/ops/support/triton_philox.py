"""Run by test_philox.py under TRITON_INTERPRET=1: tl.philox against cmpose's words."""

import torch
import triton
import triton.language as tl

from cmpose.ops.philox import philox4x32


@triton.jit
def words(out, seed, n: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, n)
    c0 = index.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c0 * 7, c0 * 0 + 5, c0 * 0 + 2)
    tl.store(out + index, w0.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + n + index, w1.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 2 * n + index, w2.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out + 3 * n + index, w3.to(tl.int64) & 0xFFFFFFFF)


def main() -> None:
    count, seed = 256, 0x1234567890ABCDEF
    actual = torch.empty(4, count, dtype=torch.int64)
    words[(1,)](actual, seed, count)
    index = torch.arange(count)
    counter = (index, index * 7, torch.tensor(5), torch.tensor(2))
    expected = torch.stack(philox4x32(counter, torch.tensor(seed)))
    print("equal" if torch.equal(actual, expected) else "different", count)


if __name__ == "__main__":
    main()
