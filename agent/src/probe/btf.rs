//! Where fields lie in the running kernel's structures.
//!
//! The kernel describes its own types in BTF (`Documentation/bpf/btf.rst`): a header, one record
//! for each type, and strings. This reader knows just enough of it to walk from a structure's name
//! along a dotted path to a byte offset. It never trusts what it reads: a truncated or absurd file
//! gives an error or `None`.

use std::collections::HashMap;

use agent_ebpf::{Config, Offsets};

/// The running kernel's BTF.
pub const RUNNING_KERNEL: &str = "/sys/kernel/btf/vmlinux";

// enum of BTF_KIND_* in include/uapi/linux/btf.h
const INT: u8 = 1;
const PTR: u8 = 2;
const ARRAY: u8 = 3;
const STRUCT: u8 = 4;
const UNION: u8 = 5;
const ENUM: u8 = 6;
const FWD: u8 = 7;
const TYPEDEF: u8 = 8;
const VOLATILE: u8 = 9;
const CONST: u8 = 10;
const RESTRICT: u8 = 11;
const FUNC: u8 = 12;
const FUNC_PROTO: u8 = 13;
const VAR: u8 = 14;
const DATASEC: u8 = 15;
const FLOAT: u8 = 16;
const DECL_TAG: u8 = 17;
const TYPE_TAG: u8 = 18;
const ENUM64: u8 = 19;

const MAGIC: u16 = 0xeb9f;

/// How deep anonymous members and chains of typedefs are followed. Real ones are below ten.
const MAX_DEPTH: u32 = 32;

/// Why a file is no BTF that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BtfParseError {
    /// Wrong magic number; big-endian BTF is not supported.
    #[error("it is not little-endian BTF")]
    Magic,
    /// It ends before it should.
    #[error("it is truncated at byte {0}")]
    Truncated(usize),
    /// A kind of type that this reader has never heard of, so that its length is unknown.
    #[error("type {id} is of unknown kind {kind}")]
    Kind {
        /// The type's number.
        id: usize,
        /// The kind.
        kind: u8,
    },
}

#[derive(Debug, Clone, Copy)]
struct Type {
    kind: u8,
    /// The upper bit of `info`: member offsets carry a bit-field size in their upper byte.
    kind_flag: bool,
    /// How many records of its own follow.
    len: u16,
    /// Its size, or the type that it refers to.
    size_or_ref: u32,
    /// Where its own records are.
    body: usize,
}

/// Types by number and, for structures and typedefs, by name.
#[derive(Debug)]
pub struct BtfTypes<'a> {
    data: &'a [u8],
    strings: &'a [u8],
    types: Vec<Type>,
    names: HashMap<(u8, &'a [u8]), u32>,
}

impl<'a> BtfTypes<'a> {
    /// Reads the type section's outline.
    pub fn parse(data: &'a [u8]) -> Result<Self, BtfParseError> {
        if data.get(..2) != Some(&MAGIC.to_le_bytes()) {
            return Err(BtfParseError::Magic);
        }
        // struct btf_header: magic u16, version u8, flags u8, then u32s
        let header = |at| word(data, at).map(|value| value as usize).ok_or(BtfParseError::Truncated(at));
        let (header_len, type_off, type_len) = (header(4)?, header(8)?, header(12)?);
        let (string_off, string_len) = (header(16)?, header(20)?);
        let section = |offset: usize, len: usize| {
            let start = header_len.saturating_add(offset);
            let end = start.saturating_add(len);
            if data.get(start..end).is_some() {
                Ok((start, end))
            } else {
                Err(BtfParseError::Truncated(data.len()))
            }
        };
        let (mut at, end) = section(type_off, type_len)?;
        let (string_start, string_end) = section(string_off, string_len)?;
        let mut btf = Self {
            data,
            strings: &data[string_start..string_end],
            // type 0 is void
            types: vec![Type { kind: 0, kind_flag: false, len: 0, size_or_ref: 0, body: 0 }],
            names: HashMap::new(),
        };
        while at < end {
            let (Some(name), Some(info), Some(size_or_ref)) =
                (word(data, at), word(data, at + 4), word(data, at + 8))
            else {
                return Err(BtfParseError::Truncated(at));
            };
            let len = (info & 0xffff) as u16;
            let kind = (info >> 24 & 0x1f) as u8;
            let body = at + 12;
            let body_len = usize::from(len)
                * match kind {
                    STRUCT | UNION | DATASEC | ENUM64 => 12,
                    ENUM | FUNC_PROTO => 8,
                    _ => 0,
                }
                + match kind {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    PTR | STRUCT | UNION | ENUM | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC
                    | FUNC_PROTO | DATASEC | FLOAT | TYPE_TAG | ENUM64 => 0,
                    kind => return Err(BtfParseError::Kind { id: btf.types.len(), kind }),
                };
            if body + body_len > end {
                return Err(BtfParseError::Truncated(at));
            }
            let id = btf.types.len() as u32;
            if matches!(kind, STRUCT | TYPEDEF)
                && let Some(name) = string(btf.strings, name)
                && !name.is_empty()
            {
                btf.names.entry((kind, name)).or_insert(id);
            }
            btf.types.push(Type { kind, kind_flag: info >> 31 == 1, len, size_or_ref, body });
            at = body + body_len;
        }
        Ok(btf)
    }

    fn get(&self, id: u32) -> Option<Type> {
        self.types.get(id as usize).copied()
    }

    /// The type behind typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<Type> {
        for _ in 0..MAX_DEPTH {
            let found = self.get(id)?;
            match found.kind {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => id = found.size_or_ref,
                _ => return Some(found),
            }
        }
        None
    }

    /// Bit offset and type of a member; those of anonymous members count as the structure's own.
    fn member(&self, of: Type, name: &[u8], depth: u32) -> Option<(u64, u32)> {
        if depth > MAX_DEPTH || !matches!(of.kind, STRUCT | UNION) {
            return None;
        }
        for index in 0..usize::from(of.len) {
            let at = of.body + index * 12;
            let (member_name, id, offset) = (
                string(self.strings, word(self.data, at)?)?,
                word(self.data, at + 4)?,
                word(self.data, at + 8)?,
            );
            let offset = u64::from(if of.kind_flag { offset & 0x00ff_ffff } else { offset });
            if member_name == name {
                return Some((offset, id));
            }
            if member_name.is_empty()
                && let Some(inner) = self.resolve(id)
                && let Some((inner_offset, inner_id)) = self.member(inner, name, depth + 1)
            {
                return Some((offset + inner_offset, inner_id));
            }
        }
        None
    }

    fn field(&self, structure: &str, path: &str) -> Option<(u32, u32)> {
        let mut id = *self.names.get(&(STRUCT, structure.as_bytes()))?;
        let mut bits = 0;
        for name in path.split('.') {
            let (offset, inner) = self.member(self.resolve(id)?, name.as_bytes(), 0)?;
            bits += offset;
            id = inner;
        }
        (bits % 8 == 0).then_some((u32::try_from(bits / 8).ok()?, id))
    }

    /// Byte offset of a field: `path` is dotted and goes through embedded structures, never through
    /// pointers. `None` when there is no such field, or it is a bit field off a byte boundary.
    pub fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        self.field(structure, path).map(|(offset, _)| offset)
    }

    /// Size of a structure, bytes.
    pub fn size(&self, structure: &str) -> Option<u32> {
        self.get(*self.names.get(&(STRUCT, structure.as_bytes()))?).map(|found| found.size_or_ref)
    }

    /// Whether a field is an array.
    fn is_array(&self, structure: &str, path: &str) -> bool {
        self.field(structure, path)
            .and_then(|(_, id)| self.resolve(id))
            .is_some_and(|found| found.kind == ARRAY)
    }

    /// The arguments of a tracepoint: for each, whether it is a pointer. `None` when the kernel has
    /// no such tracepoint.
    pub fn tracepoint(&self, name: &str) -> Option<Vec<bool>> {
        let typedef = format!("btf_trace_{name}");
        // typedef of a pointer to a function, whose first argument is the tracing program's own
        let pointer = self.resolve(*self.names.get(&(TYPEDEF, typedef.as_bytes()))?)?;
        let proto = self.resolve(pointer.size_or_ref)?;
        if pointer.kind != PTR || proto.kind != FUNC_PROTO {
            return None;
        }
        (1..usize::from(proto.len))
            .map(|index| {
                let id = word(self.data, proto.body + index * 8 + 4)?;
                Some(self.resolve(id)?.kind == PTR)
            })
            .collect()
    }

    /// Fills in what this kernel's types decide. Fields that it lacks go to `missing`: structure,
    /// path, and whether nothing works without.
    pub fn configure(&self, config: &mut Config, missing: impl FnMut(&'static str, &'static str, bool)) {
        config.offsets = Offsets::fill(|structure, path| self.offset(structure, path), missing);
        config.upid_size = self.size("upid").unwrap_or(16);
        (config.rss_stride, config.rss_count) = if self.is_array("mm_struct", "rss_stat") {
            (self.size("percpu_counter").unwrap_or(0), self.offset("percpu_counter", "count").unwrap_or(0))
        } else {
            (8, 0)
        };
        if config.rss_stride == 0 {
            config.offsets.mm_rss_stat = Offsets::NONE;
        }
        config.sigaction_size = self.size("k_sigaction").unwrap_or(0);
        if config.sigaction_size == 0 {
            config.offsets.sighand_action = Offsets::NONE;
        }
        let arguments = |name| self.tracepoint(name).unwrap_or_default();
        config.exit_has_group_dead = u32::from(arguments("sched_process_exit").len() > 1);
        config.oom_has_task = u32::from(arguments("mark_victim").first() == Some(&true));
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn string(strings: &[u8], at: u32) -> Option<&[u8]> {
    let rest = strings.get(at as usize..)?;
    rest.iter().position(|&byte| byte == 0).map(|end| &rest[..end])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A small BTF: `struct outer { int a; struct { char b; inner_t c; }; }`,
    /// `typedef struct inner { int d; } inner_t`, and the tracepoint `t(void *, struct outer *, int)`.
    fn sample() -> Vec<u8> {
        let mut strings = vec![0];
        let mut name = |text: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(text.as_bytes());
            strings.push(0);
            at
        };
        let mut types = Vec::new();
        let mut push = |words: &[u32]| types.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        let info = |kind: u8, len: u32| u32::from(kind) << 24 | len;
        push(&[name("int"), info(INT, 0), 4, 32]); // 1
        push(&[name("inner"), info(STRUCT, 1), 4, name("d"), 1, 0]); // 2
        push(&[name("inner_t"), info(TYPEDEF, 0), 2]); // 3
        push(&[0, info(STRUCT, 2), 8, name("b"), 1, 0, name("c"), 3, 32]); // 4
        push(&[name("outer"), info(STRUCT, 2), 12, name("a"), 1, 0, 0, 4, 32]); // 5
        push(&[0, info(PTR, 0), 5]); // 6
        push(&[0, info(FUNC_PROTO, 3), 0, 0, 6, 0, 6, 0, 1]); // 7
        push(&[0, info(PTR, 0), 7]); // 8
        push(&[name("btf_trace_t"), info(TYPEDEF, 0), 8]); // 9
        let mut data = Vec::from(MAGIC.to_le_bytes());
        data.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            data.extend(word.to_le_bytes());
        }
        data.extend(types);
        data.extend(strings);
        data
    }

    fn ask_everything(data: &[u8]) {
        if let Ok(btf) = BtfTypes::parse(data) {
            for path in ["a", "b", "c", "c.d", "a.b", "", "."] {
                btf.offset("outer", path);
            }
            btf.size("outer");
            btf.tracepoint("t");
            btf.configure(&mut Config::empty(), |_, _, _| ());
        }
    }

    #[test]
    fn finds_fields_through_anonymous_members_and_typedefs() {
        let data = sample();
        let btf = BtfTypes::parse(&data).unwrap();
        assert_eq!(btf.offset("outer", "a"), Some(0));
        assert_eq!(btf.offset("outer", "b"), Some(4));
        assert_eq!(btf.offset("outer", "c.d"), Some(8));
        assert_eq!(btf.offset("outer", "d"), None);
        assert_eq!(btf.offset("nobody", "a"), None);
        assert_eq!(btf.size("outer"), Some(12));
        assert_eq!(btf.tracepoint("t"), Some(vec![true, false]));
        assert_eq!(btf.tracepoint("u"), None);
    }

    #[test]
    fn cycles_end() {
        let mut data = sample();
        // the anonymous member of outer becomes outer itself
        let at = data.windows(12).position(|bytes| bytes == [0, 0, 0, 0, 4, 0, 0, 0, 32, 0, 0, 0]).unwrap();
        data[at + 4] = 5;
        assert_eq!(BtfTypes::parse(&data).unwrap().offset("outer", "zzz"), None);
        // a typedef of itself
        let mut data = sample();
        let typedef = (u32::from(TYPEDEF) << 24).to_le_bytes();
        let at = data.windows(8).position(|bytes| bytes[..4] == typedef && bytes[4] == 2).unwrap();
        data[at + 4] = 3;
        assert_eq!(BtfTypes::parse(&data).unwrap().offset("outer", "c.d"), None);
    }

    #[test]
    fn every_truncation_is_refused() {
        let data = sample();
        for len in 0..data.len() {
            assert!(BtfTypes::parse(&data[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn unknown_kinds_are_named() {
        let mut data = sample();
        data[24 + 7] = 31;
        assert_eq!(BtfTypes::parse(&data).unwrap_err(), BtfParseError::Kind { id: 1, kind: 31 });
    }

    #[test]
    fn the_running_kernel_has_what_is_needed() {
        let Ok(data) = std::fs::read(RUNNING_KERNEL) else {
            eprintln!("skipped: this kernel has no {RUNNING_KERNEL}");
            return;
        };
        let btf = BtfTypes::parse(&data).unwrap();
        let mut config = Config::empty();
        btf.configure(&mut config, |structure, path, needed| {
            assert!(!needed, "{structure}.{path} was not found");
        });
        // fixed by the ABI between the kernel and itself since long
        assert_eq!(btf.offset("list_head", "prev"), Some(8));
        assert_eq!(btf.offset("upid", "ns"), Some(8));
        assert_ne!(config.offsets.task_pid, config.offsets.task_tgid);
        assert_eq!(btf.tracepoint("sched_process_fork"), Some(vec![true, true]));
    }

    proptest! {
        #[test]
        fn mutations_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..16),
                                 cut in any::<prop::sample::Index>()) {
            let mut data = sample();
            for (at, value) in changes {
                let at = at.index(data.len());
                data[at] = value;
            }
            ask_everything(&data);
            ask_everything(&data[..cut.index(data.len())]);
        }

        #[test]
        fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..512)) {
            let mut data = Vec::from(MAGIC.to_le_bytes());
            data.extend(noise);
            ask_everything(&data);
        }
    }
}
