//! EfficientNet (Tan & Le 2019): stages of inverted residual blocks with squeeze-and-excite.

use super::{Network, Start};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::gate::Gate;
use crate::ops::pool::GlobalAvgPool;
use crate::tape::Var;

/// Blocks of one kind; the first changes resolution and channels, the others keep both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stage {
    /// Channels inside a block, as a multiple of its input's.
    pub expansion: usize,
    /// Side of the depthwise kernels; odd.
    pub kernel: usize,
    /// Stride of the first block, 1 or 2.
    pub stride: usize,
    /// Output channels.
    pub channels: usize,
    /// Number of blocks.
    pub blocks: usize,
}

/// The part of an EfficientNet that computes feature maps. Its parameters have the names that torchvision
/// gives them: `features.0` is the stem, `features.1` the first stage, and so on to the head.
#[derive(Clone, PartialEq, Debug)]
pub struct EfficientNet {
    /// Channels of the stem, a 3×3 convolution of stride 2.
    pub stem: usize,
    /// From high to low resolution.
    pub stages: Vec<Stage>,
    /// Channels of a last 1×1 convolution; without it the maps end with the last stage.
    pub head: Option<usize>,
    /// Probability with which the last block would be left out; it rises linearly from 0 at the first.
    pub stochastic_depth: f64,
}

impl EfficientNet {
    /// EfficientNet-B1 without a head: B0's stages, each with 1.1 times as many blocks, rounded up.
    pub fn b1() -> Self {
        let stage = |(expansion, kernel, stride, channels, blocks)| Stage {
            expansion,
            kernel,
            stride,
            channels,
            blocks,
        };
        let stages = [
            (1, 3, 1, 16, 2),
            (6, 3, 2, 24, 3),
            (6, 5, 2, 40, 3),
            (6, 3, 2, 80, 4),
            (6, 5, 1, 112, 4),
            (6, 5, 2, 192, 5),
            (6, 3, 1, 320, 2),
        ];
        Self {
            stem: 32,
            stages: stages.map(stage).to_vec(),
            head: None,
            stochastic_depth: 0.2,
        }
    }

    /// Records the network on `images`, N×H×W×C, and returns the last feature map of each resolution, from
    /// half of the images' on.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] never for images with at least one pixel.
    pub fn record(&self, network: &mut Network<'_>, images: Var) -> Result<Vec<Var>> {
        let mut maps = Vec::new();
        let mut x = network.scope("features.0", |n| {
            n.conv_norm(["0", "1"], images, self.stem, [3, 2], Activation::Silu)
        })?;
        let blocks: usize = self.stages.iter().map(|stage| stage.blocks).sum();
        let mut block = 0;
        for (i, stage) in self.stages.iter().enumerate() {
            if stage.stride > 1 {
                maps.push(x);
            }
            for j in 0..stage.blocks {
                let stride = if j == 0 { stage.stride } else { 1 };
                let rate = self.stochastic_depth * block as f64 / blocks as f64;
                x = network.scope(&format!("features.{}.{j}", i + 1), |n| {
                    let branch = n.scope("block", |n| branch(n, x, stage, stride))?;
                    if n.shape(branch) == n.shape(x) {
                        n.stochastic_depth(branch, x, rate)
                    } else {
                        Ok(branch)
                    }
                })?;
                block += 1;
            }
        }
        if let Some(channels) = self.head {
            let name = format!("features.{}", self.stages.len() + 1);
            x = network.scope(&name, |n| {
                n.conv_norm(["0", "1"], x, channels, [1, 1], Activation::Silu)
            })?;
        }
        maps.push(x);
        Ok(maps)
    }
}

/// Expansion, depthwise convolution, squeeze-and-excite, projection; to be added to `x` where extents allow.
fn branch(network: &mut Network<'_>, x: Var, stage: &Stage, stride: usize) -> Result<Var> {
    let channels = network.shape(x).c;
    let (mut y, mut layer) = (x, 0);
    if stage.expansion > 1 {
        y = network.scope("0", |n| {
            let channels = channels * stage.expansion;
            n.conv_norm(["0", "1"], y, channels, [1, 1], Activation::Silu)
        })?;
        layer = 1;
    }
    y = network.scope(&layer.to_string(), |n| {
        let kernel = [stage.kernel, stride];
        n.depthwise_conv_norm(["0", "1"], y, kernel, Activation::Silu)
    })?;
    y = network.scope(&(layer + 1).to_string(), |n| {
        squeeze_excite(n, y, (channels / 4).max(1))
    })?;
    network.scope(&(layer + 2).to_string(), |n| {
        let (channels, identity) = (stage.channels, Activation::Identity);
        n.conv_norm(["0", "1"], y, channels, [1, 1], identity)
    })
}

/// `x·σ(W₂·silu(W₁·x̄ + b₁) + b₂)` with the average `x̄` of each channel over the image and `squeezed` channels
/// in between (Hu, Shen, Sun 2018).
fn squeeze_excite(network: &mut Network<'_>, x: Var, squeezed: usize) -> Result<Var> {
    let channels = network.shape(x).c;
    let average = network.tape().push(GlobalAvgPool, &[x])?;
    let (silu, identity) = (Activation::Silu, Activation::Identity);
    let hidden = network.linear("fc1", average, squeezed, Start::HeNormal, silu)?;
    let logits = network.linear("fc2", hidden, channels, Start::Uniform, identity)?;
    network.tape().push(Gate, &[x, logits])
}
