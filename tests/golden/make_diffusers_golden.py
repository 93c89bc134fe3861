"""Write the golden files of diffusers' UNet2DModel (run by hand where diffusers is installed).

python tests/golden/make_diffusers_golden.py
"""

import json
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "networks"


def main() -> None:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=16,
        attn_norm_num_groups=32,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=4,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, t = torch.randn(3, 3, 16, 16), 1000.0 * torch.tensor([-1.5, 0.1, 1.09])
        labels = torch.tensor([0, 3, 2])
        y = model(x, t, class_labels=labels).sample
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        HERE / "diffusers-adm-cond.model.safetensors",
    )
    save_file(
        {"in.x": x, "in.time": t, "in.labels": labels, "out.raw": y},
        HERE / "diffusers-adm-cond.tensors.safetensors",
    )
    config = {k: v for k, v in model.config.items() if k != "_use_default_values"}
    config["_source"] = f"diffusers {diffusers.__version__} UNet2DModel"
    (HERE / "diffusers-adm-cond.config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
