"""Compiles the CUDA C++ ops for the CPU and prints the module's path."""

import argparse

from tests import cuda_on_cpu

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sanitize", action="store_true", help="with Address- and UBSanitizer")
print(cuda_on_cpu.build(sanitize=parser.parse_args().sanitize))
