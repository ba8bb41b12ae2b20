//! The U-Net (Ronneberger, Fischer, Brox 2015), with bilinear upsampling and a class head on the
//! bottleneck.

use super::{Heads, Logits, Network};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::pool::{GlobalAvgPool, MaxPool2d};
use crate::ops::upsample::Upsample2x;
use crate::tape::Var;

/// A U-Net: at each level two 3×3 convolutions, each with batch normalisation and ReLU; 2×2 max
/// pooling on the way down, bilinear 2× upsampling and the skip's channels on the way up.
///
/// Intensities enter as they are, in [0, 1]: the first convolution is normalised, which absorbs any
/// affine map of them, and the black of the letterbox then equals the convolutions' zero padding.
#[derive(Clone, PartialEq, Debug)]
pub struct UNet {
    /// Channels of each level, from full resolution to the bottleneck. Extents must be divisible by
    /// 2 to the power of their number less one.
    pub widths: Vec<usize>,
    /// Share of the class head's inputs that are dropped in training.
    pub dropout: f64,
}

impl UNet {
    /// Records the network on `images`, N×H×W×C.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if H or W cannot be halved as often as there are levels below the
    /// first.
    pub fn record(&self, network: &mut Network<'_>, images: Var, heads: Heads) -> Result<Logits> {
        let mut x = images;
        let mut skips = Vec::new();
        for (level, &width) in self.widths.iter().enumerate() {
            if level > 0 {
                skips.push(x);
            }
            x = network.scope(&format!("encoder.{level}"), |n| {
                let pool = MaxPool2d {
                    kernel: [2, 2],
                    stride: [2, 2],
                    padding: [0, 0],
                };
                let x = if level > 0 {
                    n.tape().push(pool, &[x])?
                } else {
                    x
                };
                block(n, x, width)
            })?;
        }
        let malignancy = if heads.malignancy {
            let pooled = network.scope("malignancy", |n| {
                let pooled = n.tape().push(GlobalAvgPool, &[x])?;
                n.dropout(pooled, self.dropout)
            })?;
            Some(network.logit("malignancy", pooled)?)
        } else {
            None
        };
        let mask = if heads.mask {
            for (level, &skip) in skips.iter().enumerate().rev() {
                x = network.scope(&format!("decoder.{level}"), |n| {
                    let joint = n.tape().push(Upsample2x, &[x, skip])?;
                    block(n, joint, self.widths[level])
                })?;
            }
            Some(network.logit("mask", x)?)
        } else {
            None
        };
        Ok(Logits { mask, malignancy })
    }
}

/// Two 3×3 convolutions, each with batch normalisation and ReLU.
pub(super) fn block(network: &mut Network<'_>, mut x: Var, width: usize) -> Result<Var> {
    for i in 1..=2 {
        let layers = [&*format!("conv{i}"), &*format!("norm{i}")];
        x = network.conv_norm(layers, x, width, [3, 1], Activation::Relu)?;
    }
    Ok(x)
}
