"""The gateway stays light: no torch, whatever it imports."""

import subprocess
import sys


def test_the_gateway_imports_no_torch():
    code = (
        "import sys, services.gateway.main; print(*sorted({'torch', 'transformers', 'numba', 'ucxx'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == ""
