//! From a tape to addresses: which steps run, what is recomputed, where every value lies.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::{Kind, Step, Tape, Value, Var};
use crate::error::{Error, Result};
use crate::ops::{Copied, Cost, Op};
use crate::tensor::Shape;

/// Every address is a multiple of this many elements, a cache line of `f32`.
const ALIGN: usize = 16;

/// Words of a gap behind a value ([`Options::gaps`]).
const GAP: usize = 4 * ALIGN;

/// How to plan.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Run cheap forward steps again in the backward pass instead of keeping their results.
    pub recompute: bool,
    /// Let operations overwrite an input that nobody reads any more.
    pub in_place: bool,
    /// What the plan is for.
    pub target: Target,
    /// Leave a gap behind every value, so that a kernel that writes beyond one is noticed
    /// ([`crate::gradcheck::check_on`]).
    pub gaps: bool,
}

/// What a plan runs on, which decides about working memory and storage.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Target {
    /// A session of [`crate::device::cpu`].
    #[default]
    Cpu,
    /// A session of [`crate::device::gpu`], activations stored as f32.
    Gpu,
    /// A session of [`crate::device::gpu`], activations stored as bf16 ([`Value::narrow`]).
    NarrowGpu,
}

impl Options {
    /// The usual plan for a GPU, with activations in bf16 if `narrow`.
    pub fn gpu(narrow: bool) -> Self {
        Self {
            target: if narrow {
                Target::NarrowGpu
            } else {
                Target::Gpu
            },
            ..Self::default()
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            recompute: true,
            in_place: true,
            target: Target::Cpu,
            gaps: false,
        }
    }
}

/// A piece of the arena.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Slot {
    /// First word; a word holds one element, or two that are narrow.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Whether elements are stored as bf16.
    pub narrow: bool,
}

/// A step with everything that its replay needs.
#[derive(Clone, Debug)]
pub struct PlannedStep {
    /// What is done.
    pub op: Arc<dyn Op>,
    /// Values read.
    pub inputs: Vec<Var>,
    /// Values written.
    pub outputs: Vec<Var>,
    /// Where the inputs lie, and their extents.
    pub read: Vec<(Slot, Shape)>,
    /// Where the outputs lie, and their extents.
    pub write: Vec<(Slot, Shape)>,
    /// Working memory.
    pub scratch: Slot,
    /// The copy of an input that it wants ([`Op::device_copy`]).
    pub copy: Slot,
    /// Whether that copy can be made before the first step: nothing has written its original by then.
    pub early: bool,
    /// The input that output 0 overwrites.
    pub in_place: Option<usize>,
    /// Whether it belongs to the backward pass, reruns of forward steps included.
    pub backward: bool,
    /// Arithmetic and compulsory traffic.
    pub cost: Cost,
    /// Words of the arena that are alive while this step runs, without persistent values.
    pub alive: usize,
}

/// A tape with its memory laid out. Printing it lists every step.
#[derive(Clone, Debug)]
pub struct Plan {
    values: Vec<Value>,
    slots: Vec<Slot>,
    steps: Vec<PlannedStep>,
    persistent: usize,
    len: usize,
    target: Target,
}

impl Plan {
    /// Lays out the memory of `tape`. Steps whose results nobody reads are left out.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tape needs more elements than can be addressed.
    pub fn new(tape: &Tape, options: Options) -> Result<Self> {
        let mut values = tape.values().to_vec();
        let mut steps = tape.steps().to_vec();
        if options.recompute {
            steps = recompute(&steps, &mut values);
        }
        prune(&mut steps, &values);
        layout(steps, values, options)
    }

    /// All values, by [`Var::index`]; recomputed ones follow those of the tape.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// The steps of one replay.
    pub fn steps(&self) -> &[PlannedStep] {
        &self.steps
    }

    /// What it is for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Where each value lies, by [`Var::index`].
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Where a value lies.
    pub fn slot(&self, var: Var) -> Slot {
        self.slots[var.index()]
    }

    /// Words of the whole arena: persistent values, then computed ones.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is stored at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Words of inputs, parameters and states.
    pub fn persistent(&self) -> usize {
        self.persistent
    }

    /// Floating-point operations of one replay.
    pub fn flops(&self) -> u64 {
        self.steps.iter().map(|s| s.cost.flops).sum()
    }
}

/// A value that much smaller than the largest is not worth a step that computes it again.
const SMALL: usize = 256;

/// Results that can be had again cheaply ([`Op::rerun`]) and are not small are computed again right before the gradient
/// steps that read them, so that they need not live from the forward to the backward pass. The backwards of
/// neighbouring forward steps share a rerun, others get their own: sharing one between distant steps would keep
/// it alive in between, which is what recomputing is there to avoid.
fn recompute(steps: &[Step], values: &mut Vec<Value>) -> Vec<Step> {
    let computed = values.iter().filter(|v| v.kind == Kind::Computed);
    let largest = computed.map(|v| v.shape.len()).max().unwrap_or(0);
    let len = |var: Var| values[var.index()].shape.len();
    let cheap = steps
        .iter()
        .filter(|step| step.origin.is_none())
        .filter(|step| {
            step.outputs
                .first()
                .is_some_and(|&v| len(v) >= largest / SMALL)
        })
        .filter_map(|step| {
            let (op, inputs) = step.op.rerun(&step.inputs, &step.outputs)?;
            Some((step.outputs[0], (op, inputs)))
        })
        .collect();
    let mut reruns = Reruns {
        cheap,
        done: HashMap::new(),
        before: HashMap::new(),
        values,
        steps: Vec::new(),
    };
    let mut current = None;
    for step in steps {
        let mut step = step.clone();
        if step.origin.is_some() {
            if step.origin != current {
                current = step.origin;
                reruns.before = std::mem::take(&mut reruns.done);
            }
            step.inputs
                .iter_mut()
                .for_each(|v| *v = reruns.get(*v, current));
        }
        reruns.steps.push(step);
    }
    reruns.steps
}

struct Reruns<'a> {
    cheap: HashMap<Var, (Arc<dyn Op>, Vec<Var>)>,
    /// What has been computed again for the current forward step's backward.
    done: HashMap<Var, Var>,
    /// The same for the backward recorded before that one.
    before: HashMap<Var, Var>,
    values: &'a mut Vec<Value>,
    steps: Vec<Step>,
}

impl Reruns<'_> {
    /// The value to read in place of `var`, whose rerun is appended if there is none yet.
    fn get(&mut self, var: Var, origin: Option<usize>) -> Var {
        if let Some(&again) = self.done.get(&var) {
            return again;
        }
        if let Some(&again) = self.before.get(&var) {
            self.done.insert(var, again);
            return again;
        }
        let Some((op, inputs)) = self.cheap.get(&var).cloned() else {
            return var;
        };
        let inputs = inputs.into_iter().map(|v| self.get(v, origin)).collect();
        self.values.push(Value {
            kept: false,
            ..self.values[var.index()].clone()
        });
        let again = Var(self.values.len() as u32 - 1);
        self.steps.push(Step {
            op,
            inputs,
            outputs: vec![again],
            origin,
        });
        self.done.insert(var, again);
        again
    }
}

/// Drops steps whose outputs are neither kept nor read by a step that stays.
fn prune(steps: &mut Vec<Step>, values: &[Value]) {
    let mut read: Vec<bool> = values.iter().map(|v| v.kept).collect();
    let mut stays = vec![false; steps.len()];
    for (step, stays) in steps.iter().zip(&mut stays).rev() {
        *stays = step.outputs.iter().any(|v| read[v.index()]);
        if *stays {
            step.inputs.iter().for_each(|v| read[v.index()] = true);
        }
    }
    let mut stays = stays.into_iter();
    steps.retain(|_| stays.next().unwrap());
}

/// A block of the arena and the steps during which it is taken, both ends included.
struct Block {
    len: usize,
    first: usize,
    last: usize,
    offset: usize,
}

fn aligned(len: usize) -> usize {
    len.next_multiple_of(ALIGN)
}

fn layout(steps: Vec<Step>, values: Vec<Value>, options: Options) -> Result<Plan> {
    let narrow = |v: &Value| v.narrow && options.target == Target::NarrowGpu;
    let gap = if options.gaps { GAP } else { 0 };
    let words = |v: &Value| {
        let len = v.shape.len();
        gap + aligned(if narrow(v) { len.div_ceil(2) } else { len })
    };
    let mut last_use: Vec<usize> = values
        .iter()
        .map(|v| if v.kept { usize::MAX } else { 0 })
        .collect();
    for (index, step) in steps.iter().enumerate() {
        for v in step.inputs.iter().chain(&step.outputs) {
            last_use[v.index()] = last_use[v.index()].max(index);
        }
    }

    let mut slots = vec![Slot::default(); values.len()];
    let mut persistent = 0;
    for (value, slot) in values.iter().zip(&mut slots) {
        if value.kind != Kind::Computed {
            *slot = Slot {
                offset: persistent,
                len: value.shape.len(),
                narrow: narrow(value),
            };
            persistent += words(value);
        }
    }

    // One block per computed value, shared with the input that a step overwrites; scratch is a
    // block that lives for one step.
    let mut blocks: Vec<Block> = Vec::new();
    let mut block_of: Vec<Option<usize>> = vec![None; values.len()];
    let mut scratch_of: Vec<Option<usize>> = vec![None; steps.len()];
    let mut copy_of: Vec<Option<usize>> = vec![None; steps.len()];
    // Persistent values that a step has written.
    let mut written = vec![false; values.len()];
    let mut in_place: Vec<Option<usize>> = vec![None; steps.len()];
    for (index, step) in steps.iter().enumerate() {
        let shapes = |vars: &[Var]| {
            vars.iter()
                .map(|v| values[v.index()].shape)
                .collect::<Vec<_>>()
        };
        for (o, &output) in step.outputs.iter().enumerate() {
            if values[output.index()].kind != Kind::Computed {
                continue;
            }
            let len = words(&values[output.index()]);
            let overwritten = step.op.in_place().filter(|&i| {
                let input = step.inputs[i];
                o == 0
                    && options.in_place
                    && values[input.index()].kind == Kind::Computed
                    && last_use[input.index()] == index
                    && values[input.index()].shape.len() == values[output.index()].shape.len()
                    && values[input.index()].narrow == values[output.index()].narrow
                    && step.inputs.iter().filter(|&&v| v == input).count() == 1
            });
            let block = match overwritten {
                Some(input) => {
                    in_place[index] = overwritten;
                    block_of[step.inputs[input].index()].expect("inputs are written before use")
                }
                None => {
                    blocks.push(Block {
                        len,
                        first: index,
                        last: index,
                        offset: 0,
                    });
                    blocks.len() - 1
                }
            };
            blocks[block].last = last_use[output.index()].min(steps.len());
            block_of[output.index()] = Some(block);
        }
        let (inputs, outputs) = (shapes(&step.inputs), shapes(&step.outputs));
        let len = match options.target {
            Target::Cpu => step.op.scratch(&inputs, &outputs),
            Target::Gpu | Target::NarrowGpu => step
                .op
                .device_scratch(&inputs, &outputs)
                .div_ceil(size_of::<f32>()),
        };
        if len > 0 {
            blocks.push(Block {
                len: gap + aligned(len),
                first: index,
                last: index,
                offset: 0,
            });
            scratch_of[index] = Some(blocks.len() - 1);
        }
        let copy = match options.target {
            Target::Cpu => None,
            Target::Gpu | Target::NarrowGpu => step.op.device_copy(&inputs, &outputs),
        };
        if let Some(Copied { input, bytes }) = copy {
            let original = step.inputs[input].index();
            let early = values[original].kind != Kind::Computed && !written[original];
            blocks.push(Block {
                len: gap + aligned(bytes.div_ceil(size_of::<f32>())),
                first: if early { 0 } else { index },
                last: index,
                offset: 0,
            });
            copy_of[index] = Some(blocks.len() - 1);
        }
        step.outputs.iter().for_each(|v| written[v.index()] = true);
    }
    let transient = place(&mut blocks);
    let len = persistent
        .checked_add(transient)
        .filter(|&len| len <= isize::MAX as usize / 8)
        .ok_or_else(|| Error::shape("plan", "needs more memory than can be addressed"))?;

    for (slot, (block, value)) in slots.iter_mut().zip(block_of.iter().zip(&values)) {
        if let Some(block) = *block {
            *slot = Slot {
                offset: persistent + blocks[block].offset,
                len: value.shape.len(),
                narrow: narrow(value),
            };
        }
    }
    let mut alive = vec![0; steps.len() + 1];
    for block in &blocks {
        alive[block.first..=block.last]
            .iter_mut()
            .for_each(|a| *a += block.len);
    }
    let place_of = |vars: &[Var]| -> Vec<(Slot, Shape)> {
        vars.iter()
            .map(|v| (slots[v.index()], values[v.index()].shape))
            .collect()
    };
    let steps = steps
        .into_iter()
        .enumerate()
        .map(|(index, step)| {
            let (read, write) = (place_of(&step.inputs), place_of(&step.outputs));
            let shapes = |list: &[(Slot, Shape)]| list.iter().map(|x| x.1).collect::<Vec<_>>();
            let slot = |block: Option<usize>| {
                block.map_or(Slot::default(), |b| Slot {
                    offset: persistent + blocks[b].offset,
                    len: blocks[b].len - gap,
                    narrow: false,
                })
            };
            let copy = copy_of[index];
            PlannedStep {
                cost: step.op.cost(&shapes(&read), &shapes(&write)),
                op: step.op,
                inputs: step.inputs,
                outputs: step.outputs,
                read,
                write,
                scratch: slot(scratch_of[index]),
                copy: slot(copy),
                early: copy.is_some_and(|b| blocks[b].first == 0),
                in_place: in_place[index],
                backward: step.origin.is_some(),
                alive: alive[index],
            }
        })
        .collect();
    Ok(Plan {
        values,
        slots,
        steps,
        persistent,
        len,
        target: options.target,
    })
}

/// Gives each block an offset such that blocks alive at the same step never overlap, and returns the
/// extent of all. Largest first, each at the lowest gap among its contemporaries: within a few per
/// cent of the largest sum of living blocks for networks.
fn place(blocks: &mut [Block]) -> usize {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&b| (std::cmp::Reverse(blocks[b].len), b));
    let mut placed: Vec<usize> = Vec::with_capacity(blocks.len());
    let mut extent = 0;
    for b in order {
        let (first, last, len) = (blocks[b].first, blocks[b].last, blocks[b].len);
        // `placed` is ordered by offset, so one sweep finds the lowest gap that is wide enough.
        let mut offset = 0;
        for other in placed.iter().map(|&p| &blocks[p]) {
            if other.first <= last && first <= other.last {
                if other.offset >= offset + len {
                    break;
                }
                offset = offset.max(other.offset + other.len);
            }
        }
        blocks[b].offset = offset;
        extent = extent.max(offset + len);
        let position = placed.partition_point(|&p| blocks[p].offset <= offset);
        placed.insert(position, b);
    }
    extent
}

impl fmt::Display for Plan {
    /// One line a step: number, operation, output's name and extent, memory alive, arithmetic.
    /// Bytes are those of `f32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = 4.0 / (1 << 20) as f64;
        writeln!(
            f,
            "{:>5}  {:<28} {:<44} {:<20} {:>10} {:>10} {:>10}",
            "step", "operation", "output", "shape", "moved MiB", "alive MiB", "MFLOP"
        )?;
        for (index, step) in self.steps.iter().enumerate() {
            let (name, shape) = match step.outputs.first() {
                Some(v) => (
                    self.values[v.index()].name.as_str(),
                    step.write[0].1.to_string(),
                ),
                None => ("", String::new()),
            };
            writeln!(
                f,
                "{index:>5}  {:<28} {name:<44} {shape:<20} {:>10.2} {:>10.2} {:>10.2}",
                step.op.name(),
                step.cost.elements as f64 * MIB,
                step.alive as f64 * MIB,
                step.cost.flops as f64 / 1e6,
            )?;
        }
        let peak = self.steps.iter().map(|s| s.alive).max().unwrap_or(0);
        writeln!(
            f,
            "{} steps, {:.3} GFLOP; {:.1} MiB persistent, {:.1} MiB peak of living values, {:.1} MiB arena",
            self.steps.len(),
            self.flops() as f64 / 1e9,
            self.persistent as f64 * MIB,
            peak as f64 * MIB,
            self.len as f64 * MIB,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_alive_together_never_overlap(
            spans in prop::collection::vec((0usize..40, 0usize..12, 1usize..9), 1..60)
        ) {
            let mut blocks: Vec<Block> = spans
                .iter()
                .map(|&(first, span, len)| Block { len: len * ALIGN, first, last: first + span, offset: 0 })
                .collect();
            let extent = place(&mut blocks);
            for (i, a) in blocks.iter().enumerate() {
                prop_assert!(a.offset + a.len <= extent);
                for b in &blocks[..i] {
                    let contemporary = a.first <= b.last && b.first <= a.last;
                    let disjoint = a.offset + a.len <= b.offset || b.offset + b.len <= a.offset;
                    prop_assert!(!contemporary || disjoint);
                }
            }
        }
    }
}
