"""The data set card of a release, in Hugging Face's form."""

from __future__ import annotations

from typing import Any

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


def make_card(certificate: dict[str, Any]) -> str:
    """The text of the release's ``README.md``.

    Args:
        certificate: The certificate, without file digests.
    """
    claimed, public = certificate["claim"], certificate["published_without_noise"]
    channels, height, width = public["image_shape"]
    knobs = "\n".join(f"| {name} | {knob['value']} | {knob['origin']} |" for name, knob in certificate["knobs"].items())
    classes = "\n".join(f"- {label}: {name}" for label, name in enumerate(public["classes"]))
    notes = "".join(f"- {note}\n" for note in certificate["notes"])
    size = next((name for limit, name in SIZES if certificate["images"] < limit), "n>1M")
    return f"""---
task_categories:
- image-classification
tags:
- synthetic
- differential-privacy
size_categories:
- {size}
---

# A synthetic image data set under differential privacy

{certificate["images"]} labelled images of {height} × {width} pixels, {channels} channel{"s" if channels > 1 else ""}, made by
`{certificate["generator"]["class"]}` of lightning-dpgen from {public["records"]} private records.

![preview](preview.png)

## Privacy

| | |
|---|---|
| ε at δ = {claimed["delta"]:g}, zero-out (the claim, by {claimed["accountant"]}) | **{claimed["epsilon"]:.3f}** |
| ε, replace-one, by {certificate["replace_one"]["accountant"]} | {certificate["replace_one"]["epsilon"]:.3f} |
| ε, zero-out, by the second accountant ({certificate["second_accountant"]["name"]}) | \
{certificate["second_accountant"]["epsilon"]:.3f} |
| rests on | the {claimed["basis"]} |

{certificate["relation_in_words"]}

Protected unit: {certificate["unit_in_words"]}

{certificate["trust_model"]}

Noise: {certificate["noise"]["source"]}. {certificate["noise"]["limits"]}

Published without noise: the number of records, the class names and the image shape. The whole argument in numbers is in
`privacy.json`; `dpgen verify` on this folder recomputes it.
{notes}
## Use

```python
from lightning_dpgen import load_release

release = load_release("this folder")
release.images, release.labels  # uint8 [N, H, W] or [N, H, W, C], int64 [N]
```

Classes:

{classes}

`generator.safetensors` is the generator: `dpgen generate` on this folder samples it again, at no further cost. The set carries what the
generator learned of the classes. It may be biased against classes or kinds of images that
were rare or hard among the records, and it is no evidence about any single record. Any accuracy quoted for it was measured on real
test records and is outside the guarantee.

## Settings and where they came from

| setting | value | origin |
|---|---|---|
{knobs}
"""
