"""What transformers, PEFT and bitsandbytes make of files: MODEL ADAPTER|- LOGITS.npy TOKEN..."""

import sys

import numpy as np


def main(folder: str, adapter: str, out: str, *tokens: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager")
    if adapter != "-":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    if getattr(model, "quantization_method", None) is not None:
        # bitsandbytes' own product is in bfloat16 on processors that have instructions for it.
        model = model.dequantize()
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[int(token) for token in tokens]])).logits
    np.save(out, logits[0].float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
