//! The four BI-RADS-like features and the malignancy prior.
