"""What users write, as type checkers must understand it. Nothing here runs: `make lint` has pyright read it. A line
that is to be refused says by which rule, and pyright reports a line that is not."""

import torch
from typing_extensions import assert_type

import tritonshare
from tritonshare import functional, nn, optim
from tritonshare.compress import Report

x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
model = torch.nn.Linear(8, 4)

# functions
assert_type(functional.conv2d_act_pool(x, weight, activation="gelu", pool="avg"), torch.Tensor)
functional.conv2d_act_pool(x, weight, activation=None, pool=None)
functional.conv2d_act_pool(x, weight, activation="rulu")  # pyright: ignore[reportArgumentType]
functional.conv2d_act_pool(x, weight, pool="mean")  # pyright: ignore[reportArgumentType]
functional.similarity_weight(weight, weight, kind="cosine")
functional.similarity_weight(weight, weight, kind="cosin")  # pyright: ignore[reportArgumentType]
functional.similarity_reduce(weight, weight, reduce="max")
functional.similarity_reduce(weight, weight, reduce="min")  # pyright: ignore[reportArgumentType]

# modules
nn.ConvActPool2d(3, 4, 3, activation="silu", pool="max")
nn.ConvActPool2d(3, 4, 3, activation="swish")  # pyright: ignore[reportArgumentType]
nn.FeatureMaps(8, 4, "rbf", gamma=1.0, update="learned")
nn.FeatureMaps(8, 4, "rbf", gamma=1.0, update="learnt")  # pyright: ignore[reportArgumentType]

# optimizers
optimizer = optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), similarity="row", state_dtype=torch.uint8)
optimizer.step()
optim.SGD(model.parameters(), momentum=0.9, max_norm=1.0)
optim.SGD(model.parameters(), betas=(0.9, 0.999))  # pyright: ignore[reportCallIssue]
optim.Adam(model.parameters(), similarity="column")  # pyright: ignore[reportArgumentType]
with optim.attach(model, optimizer):
    pass

# compression
small, report = tritonshare.compress(model, bits=4)
assert_type(small, torch.nn.Module)
assert_type(report, Report)
tritonshare.compress.save(small, "small.safetensors")
assert_type(tritonshare.compress.load("small.safetensors", model), torch.nn.Module)
assert_type(tritonshare.compress.decompress(small), torch.nn.Module)
tritonshare.compress.similar_filters(model, kind="cosine", tie="mean")
tritonshare.compress(model, bits="4")  # pyright: ignore[reportArgumentType]
