//! What a tape runs on.
