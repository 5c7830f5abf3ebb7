"""The article's four steps, on real handwritten digits, in seconds on a CPU.

    python examples/four_steps.py

Similar inputs share weights. The inputs of the layer are the 64 pixels of an image; each is described by how bright it
is in images of each digit, and pixels that behave alike come to share what the layer knows of them.

1. Feature maps: a few vectors that stand for many descriptions, by k-means.
2. Similarity of every input, and of every neuron, to every feature map: x_ik and y_jk.
3. Weights from similarities: W_ij = sum_k x_ik y_jk / sum_k x_ik^2. No 64 x 10 matrix is trained, or needed.
4. Update: feature maps follow the mean of the descriptions assigned to them, as new images come in; the neurons' side
   is trained by gradient.
"""

import torch
import torch.nn.functional as F

from tritonshare.functional import similarity_weight
from tritonshare.nn import FeatureMaps
from tritonshare.training.data import load

FEATURES, DIM, NEURONS = 24, 10, 10


def pixels_of(images):
    """[N, 64], from 0 to 1."""
    return torch.from_numpy(images).flatten(1).float() / 16


def described(x, labels):
    """Every pixel by how bright it is in images of each digit, against its mean over all: [64, 10]."""
    means = torch.stack([x[labels == digit].mean(0) for digit in range(10)], 1)
    return means - means.mean(1, keepdim=True)


def applied(input, x, y):
    """`input @ W` without W. A pixel that is always dark has no similarity to anything, and no weight."""
    return (input @ (x / x.square().sum(1, keepdim=True).clamp_min(1e-12))) @ y.T


def main(steps=300):
    torch.manual_seed(0)
    digits = load("digits")
    train, labels = pixels_of(digits.train_images), torch.from_numpy(digits.train_labels)
    held_out, held_out_labels = pixels_of(digits.held_out_images), torch.from_numpy(digits.held_out_labels)

    # 1. Feature maps from the inputs.
    codes = described(train, labels)
    maps = FeatureMaps(FEATURES, DIM, kind="cosine", update="mean", decay=0.9)
    fit = maps.fit(codes, restarts=5)
    print(
        f"1. {len(codes)} pixels, {FEATURES} feature maps: k-means ends after {fit.iterations} iterations with a sum of"
    )
    print(f"   squared distances of {fit.inertia:.2f}")

    # 2. Similarities to the feature maps. The neurons have codes of their own, which are trained.
    neurons = torch.nn.Parameter(torch.randn(NEURONS, DIM) / DIM**0.5)
    bias = torch.nn.Parameter(torch.zeros(NEURONS))

    def similarities():
        return maps.similarity(codes), maps.similarity(neurons)

    x, y = similarities()
    print(f"2. similarities of pixels {list(x.shape)} and of neurons {list(y.shape)} to the feature maps")

    # 3. Weights from similarities; applied as two thin products, so that W itself is in no memory.
    weight = similarity_weight(x, y)  # kind="projection": the article's formula
    differ = (train @ weight - applied(train, x, y)).abs().max()
    print(f"3. weights {list(weight.shape)}; two thin products in their place differ by at most {differ:.1e}")
    trained = neurons.numel() + bias.numel()
    print(f"   trained are {trained} numbers, of a dense layer {weight.numel() + NEURONS}")

    # 4. Feature maps follow the mean of what is assigned to them; neurons follow the gradient.
    first = maps.features.clone()
    optimizer = torch.optim.Adam([neurons, bias], lr=0.05)
    for step in range(steps):
        batch = torch.randint(len(train), (128,))
        if step % 10 == 0:  # new images: their pixels are assigned, and feature maps go to the mean
            some = torch.randint(len(train), (512,))
            maps(described(train[some], labels[some]))
        x, y = similarities()
        loss = F.cross_entropy(applied(train[batch], x, y) + bias, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    maps.eval()
    x, y = similarities()
    accuracy = ((applied(held_out, x, y) + bias).argmax(1) == held_out_labels).float().mean().item()
    print(f"4. after {steps} steps feature maps have moved by {(maps.features - first).norm():.3f}; loss {loss:.3f},")
    print(f"   held-out accuracy {accuracy:.1%}")

    # What sharing means: pixels of one feature map, and how alike their weights are.
    shared = maps(codes).indices
    rows = F.normalize(similarity_weight(x, y).detach(), dim=1)
    alike = rows @ rows.T
    together = (shared[:, None] == shared) & ~torch.eye(len(codes), dtype=torch.bool)
    within, between = alike[together].mean(), alike[shared[:, None] != shared].mean()
    print(f"   cosine of weights: pixels of the same feature map {within:.2f}, of others {between:.2f}")
    return accuracy, within.item(), between.item()


if __name__ == "__main__":
    main()
