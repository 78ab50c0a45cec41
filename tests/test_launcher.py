"""Every operator's launches go through Triton's own launcher, up to the driver: no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import importlib
import inductor_bytes, torch, triton

class Driver(inductor_bytes._Driver):
    "Compiles for a GPU, and counts what would be launched."

    launches = 0

    def get_current_stream(self, device):
        return 0

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        @staticmethod
        def load_binary(name, kernel, shared, device):
            assert shared <= 232448
            return 0, 0, 32, 0, 1024

    class launcher_cls:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *arguments, **options):
            Driver.launches += 1

def maps(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

names = ("batch_norm", "gradcam_cosine", "info_nce")
norm, cam, nce = (importlib.import_module(f"cast_kernels.{name}") for name in names)
x, pooled = maps(4, 64, 8, 6), maps(4, 64, 4, 3)
choice, mask = maps(4, 64, 4, 3, dtype=torch.uint8), maps(4, 8, 8, 6, dtype=torch.uint8)
v, w = torch.zeros(64), torch.zeros(2, 64)
A, alpha, saliency = maps(4, 128, 7, 7), torch.zeros(4, 128), torch.zeros(4, 7, 7)
query, queue = torch.zeros(4, 128), torch.zeros(1000, 128, dtype=torch.bfloat16)
calls = {
    "batch_norm_statistics": (2, [(x, 1e-5), (x, 1e-5, 2)]),
    "batch_norm_apply": (1, [(x, v, v, v, v), (x, w, w, v, v, x, w, w, v, v)]),
    "batch_norm_apply_mask": (1, [(x, v, v, v, v, x)]),
    "batch_norm_relu_reduce": (2, [(x, x, v, v, v, v)]),
    "batch_norm_relu_input_gradient": (1, [(x, x, v, v, v, v, v, v, 9)]),
    "batch_norm_add_reduce": (2, [(x, None, mask, x, v, v), (x, x, mask, x, v, v, x, v, v)]),
    "batch_norm_input_gradient": (1, [(x, x, v, v, v, v, v, 9)]),
    "batch_norm_input_gradients": (1, [(x, x, v, v, v, v, v, x, v, v, v, v, 9)]),
    "batch_norm_relu_pool": (1, [(x, v, v, v, v)]),
    "batch_norm_relu_pool_reduce": (2, [(pooled, pooled, choice, x, v, v, v, v)]),
    "batch_norm_relu_pool_input_gradient": (1, [(pooled, None, choice, x, v, v, v, v, v, v, 9)]),
}
operators = {value.name: value for value in vars(norm).values() if isinstance(value, norm._Operator)}
assert operators.keys() == calls.keys(), operators.keys() ^ calls.keys()
with inductor_bytes.pretended_gpu():
    triton.runtime.driver.set_active(Driver())
    for name, (launches, forms) in calls.items():
        for arguments in forms:
            Driver.launches = 0
            operators[name].launch(*arguments)
            assert Driver.launches == launches, (name, Driver.launches)
    Driver.launches = 0
    cam._launch(A, alpha, saliency, True)
    cam._launch_from_gradient(A, A, saliency, True)
    nce._launch(query, query, queue, 0.07, True)
    assert Driver.launches == 4
"""


def test_launches_reach_the_driver() -> None:
    """Options that Triton does not know, arguments that do not fit a kernel and types that do not compile fail here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT / name) for name in ("", "kernels", "benchmarks")]
    environment["PYTHONPATH"] = os.pathsep.join([*folders, environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
