"""ResNet8 classes with the layer names, biases and padding of other repositories, written for these tests."""

from torch import nn

STAGES = ((16, 16, 1), (16, 32, 2), (32, 64, 2))  # inputs, outputs, stride


class Block(nn.Module):
    """A block whose attributes are named `path` and `skip`; an exact one pads by (0, 1), as Keras does."""

    def __init__(self, inputs, outputs, stride, path, skip, bias=True, is_exact=False):
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if is_exact and stride == 2 else nn.Identity()
        layers = [nn.Conv2d(inputs, outputs, 3, stride, 0 if is_exact and stride == 2 else 1, bias=bias)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)]
        setattr(self, path, nn.Sequential(*layers, nn.BatchNorm2d(outputs)))
        setattr(
            self, skip, nn.Conv2d(inputs, outputs, 1, stride, bias=bias) if stride == 2 else nn.Identity()
        )
        self.names = path, skip

    def forward(self, x):
        path, skip = (getattr(self, name) for name in self.names)
        return (path(self.pad(x)) + skip(x)).relu()


class MLCommons(nn.Module):
    """mlcommons/tiny, training_torch: every convolution has a bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        stacks = (Block(*stage, "block", "residual") for stage in STAGES)
        self.first_stack, self.second_stack, self.third_stack = stacks
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.third_stack(self.second_stack(self.first_stack(self.stem(x)))).mean((2, 3)))


class ExecuTorch(nn.Module):
    """ExecuTorch's example without biases, or with them and Keras's padding (its pull request 22707)."""

    def __init__(self, is_aligned=False):
        super().__init__()
        entry = nn.Conv2d(3, 16, 3, padding=1, bias=is_aligned)
        self.entry = nn.Sequential(entry, nn.BatchNorm2d(16), nn.ReLU())
        blocks = (Block(*stage, "path_a", "skip", is_aligned, is_aligned) for stage in STAGES)
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.stages(self.entry(x)).mean((2, 3)))


class Start(nn.Module):
    """The start of a stage of `EmlEda`."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv1(x)).relu()


class EmlEda(nn.Module):
    """eml-eda/pytorch-benchmarks: a stage's first convolution has no bias."""

    def __init__(self):
        super().__init__()
        self.inputblock = Start(3, 16, 1)
        self.convblock1, self.convblock2, self.convblock3 = (Start(*stage) for stage in STAGES)
        seconds = (nn.Conv2d(outputs, outputs, 3, padding=1) for _, outputs, _ in STAGES)
        self.conv1, self.conv2y, self.conv3y = seconds
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(outputs) for _, outputs, _ in STAGES)
        self.conv2x, self.conv3x = nn.Conv2d(16, 32, 1, 2), nn.Conv2d(32, 64, 1, 2)
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        x = self.inputblock(x)
        x = (x + self.bn1(self.conv1(self.convblock1(x)))).relu()
        x = (self.conv2x(x) + self.bn2(self.conv2y(self.convblock2(x)))).relu()
        x = (self.conv3x(x) + self.bn3(self.conv3y(self.convblock3(x)))).relu()
        return self.out(x.mean((2, 3)))
