/// One image's part in the consistency term.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Consistency {
    /// Predicted probability of malignancy, `p̂`.
    pub p: f64,
    /// The prior of its predicted mask; `None` if the mask is not measurable.
    pub phi: Option<f64>,
    /// How decided the mask is ([`super::MaskSums::confidence`]); no gradient flows into it.
    pub confidence: f64,
    /// The image's weight: 0 for padding.
    pub weight: f64,
}

/// `ramp · Σ weightᵢ·confidenceᵢ·(p̂ᵢ − φᵢ)² / max(1, n)`, `n` the number of measurable images of
/// positive weight. Writes to `grad` its derivative with respect to each `p̂ᵢ`, which is the negative
/// of that with respect to `φᵢ`.
pub fn consistency(images: &[Consistency], ramp: f64, grad: &mut [f64]) -> f64 {
    let measurable = images
        .iter()
        .filter(|i| i.phi.is_some() && i.weight > 0.0)
        .count();
    let scale = ramp / measurable.max(1) as f64;
    let mut sum = 0.0;
    for (image, grad) in images.iter().zip(grad) {
        *grad = 0.0;
        if let Some(phi) = image.phi {
            let difference = image.p - phi;
            let factor = scale * image.weight * image.confidence;
            sum += factor * difference * difference;
            *grad = 2.0 * factor * difference;
        }
    }
    sum
}
