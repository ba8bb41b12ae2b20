//! Record, differentiate, plan, replay.
