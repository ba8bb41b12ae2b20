//! An EfficientNet encoder with a U-Net decoder whose skips pass attention gates (Oktay et al. 2018).

use super::unet::block;
use super::{EfficientNet, Heads, Logits, Network, Start};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::add_relu::AddRelu;
use crate::ops::gate::Gate;
use crate::ops::pool::GlobalAvgPool;
use crate::ops::upsample::Upsample2x;
use crate::tape::Var;

/// The network of arXiv 2511.15968: skips from the encoder's maps, a bottleneck at its last; on the way up, at
/// each level, bilinear 2× upsampling, the gated skip's channels, and two 3×3 convolutions, each with batch
/// normalisation and ReLU; the mask's logit at full resolution; a class head on the bottleneck.
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionUNet {
    /// Its parameters are named `encoder.features…`.
    pub encoder: EfficientNet,
    /// Channels of the decoder's levels, from full resolution down; one for each map of the encoder.
    pub widths: Vec<usize>,
    /// Share of the class head's inputs that are dropped in training.
    pub dropout: f64,
}

impl AttentionUNet {
    /// Records the network on `images`, N×H×W×C.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if H or W cannot be halved as often as there are maps.
    pub fn record(&self, network: &mut Network<'_>, images: Var, heads: Heads) -> Result<Logits> {
        let maps = network.scope("encoder", |n| self.encoder.record(n, images))?;
        let bottleneck = maps[maps.len() - 1];
        let malignancy = if heads.malignancy {
            let pooled = network.scope("malignancy", |n| {
                let pooled = n.tape().push(GlobalAvgPool, &[bottleneck])?;
                n.dropout(pooled, self.dropout)
            })?;
            Some(network.logit("malignancy", pooled)?)
        } else {
            None
        };
        let mask = if heads.mask {
            let mut x = bottleneck;
            for (level, &width) in self.widths.iter().enumerate().rev() {
                x = network.scope(&format!("decoder.{level}"), |n| {
                    let skip = level.checked_sub(1).map(|map| maps[map]);
                    let gated = skip.map(|skip| n.scope("gate", |n| attend(n, skip, x)));
                    let mut joint = vec![x];
                    if let Some(gated) = gated {
                        joint.push(gated?);
                    }
                    let joint = n.tape().push(Upsample2x, &joint)?;
                    block(n, joint, width)
                })?;
            }
            Some(network.logit("mask", x)?)
        } else {
            None
        };
        Ok(Logits { mask, malignancy })
    }
}

/// `x·α` with `α = σ(ψ·relu(W_x·x + W_g·g + b) + b_ψ)`, one value per pixel, and half as many channels in
/// between as `x` has. `g` has half the resolution of `x`; it is upsampled behind `W_g`, which gives the same
/// numbers as before it (a bilinear average of linear maps) at a quarter of the arithmetic.
fn attend(network: &mut Network<'_>, x: Var, g: Var) -> Result<Var> {
    let between = (network.shape(x).c / 2).max(1);
    let keys = network.conv("x", x, between, 1, Start::HeNormal)?;
    let identity = Activation::Identity;
    let query = network.linear("g", g, between, Start::HeNormal, identity)?;
    let query = network.tape().push(Upsample2x, &[query])?;
    let joint = network.tape().push(AddRelu, &[keys, query])?;
    let logits = network.logit("psi", joint)?;
    network.tape().push(Gate, &[x, logits])
}
