//! The tree of cgroup names that are followed.
//!
//! A unit is watched by its path, not by its cgroup, because that comes and goes with the unit; so
//! may every directory above it, when a slice empties. Each component of a watched path is a
//! **node**; the kernel side knows, for each cgroup that exists, its node, and for each node its
//! children by name (agent-ebpf/src/cgroup.rs). This is the agent's copy of that tree, from which
//! the maps are filled.

use std::collections::{BTreeMap, HashMap};

use agent_ebpf::{NAME_BYTES, NO_SLOT, NameKey, ROOT_NODE, Watched};

use super::{Slot, WatchError};

#[derive(Debug, Default)]
pub(super) struct Node {
    parent: u32,
    name: String,
    slot: Option<Slot>,
    children: BTreeMap<String, u32>,
}

/// Names, by node; the root is always there.
#[derive(Debug)]
pub(super) struct Names {
    nodes: HashMap<u32, Node>,
    slots: HashMap<Slot, u32>,
    next: u32,
}

impl Names {
    pub(super) fn new() -> Self {
        let nodes = HashMap::from([(ROOT_NODE, Node::default())]);
        Self { nodes, slots: HashMap::new(), next: ROOT_NODE + 1 }
    }

    /// Makes `path` the one of `slot`; returns the nodes on the way to it, topmost first, without
    /// the root. A slot that has this path already keeps it.
    pub(super) fn insert(&mut self, slot: Slot, path: &str) -> Result<Vec<u32>, WatchError> {
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let bad = |cause| WatchError::Path { path: path.to_owned(), cause };
        if !path.starts_with('/') {
            return Err(bad("it does not begin with a slash"));
        }
        if names.iter().any(|name| matches!(*name, "." | "..")) {
            return Err(bad("it has a component . or .."));
        }
        if names.iter().any(|name| name.len() >= NAME_BYTES || name.contains('\0')) {
            return Err(bad("a component is no file name"));
        }
        let existing =
            names.iter().try_fold(ROOT_NODE, |node, name| self.node(node)?.children.get(*name).copied());
        if let Some(other) = existing.and_then(|node| self.node(node)?.slot)
            && other != slot
        {
            return Err(WatchError::Taken { path: path.to_owned(), by: other });
        }
        if self.slots.get(&slot).is_some_and(|old| Some(*old) != existing) {
            return Err(WatchError::Busy { slot, path: path.to_owned() });
        }
        let mut way = Vec::new();
        let mut node = ROOT_NODE;
        for name in names {
            node = self.child(node, name);
            way.push(node);
        }
        if let Some(node) = self.nodes.get_mut(&node) {
            node.slot = Some(slot);
        }
        self.slots.insert(slot, node);
        Ok(way)
    }

    fn child(&mut self, parent: u32, name: &str) -> u32 {
        if let Some(child) = self.node(parent).and_then(|node| node.children.get(name)) {
            return *child;
        }
        let child = self.next;
        self.next += 1;
        self.nodes
            .insert(child, Node { parent, name: name.to_owned(), slot: None, children: BTreeMap::new() });
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children.insert(name.to_owned(), child);
        }
        child
    }

    /// Forgets a slot; returns the nodes that nobody needs any more, with their keys. The root is
    /// never among them.
    pub(super) fn remove(&mut self, slot: Slot) -> Vec<(u32, NameKey)> {
        let mut removed = Vec::new();
        let Some(mut node) = self.slots.remove(&slot) else { return removed };
        if let Some(node) = self.nodes.get_mut(&node) {
            node.slot = None;
        }
        while node != ROOT_NODE
            && let Some(found) = self.nodes.get(&node)
            && found.slot.is_none()
            && found.children.is_empty()
            && let Some(key) = self.key(node)
            && let Some(found) = self.nodes.remove(&node)
        {
            removed.push((node, key));
            if let Some(parent) = self.nodes.get_mut(&found.parent) {
                parent.children.remove(&found.name);
            }
            node = found.parent;
        }
        removed
    }

    fn node(&self, node: u32) -> Option<&Node> {
        self.nodes.get(&node)
    }

    /// The way from the root, which is not part of it, to a slot's node: names and nodes, topmost
    /// first. `None` when the slot has no path.
    pub(super) fn way(&self, slot: Slot) -> Option<Vec<(String, u32)>> {
        let mut node = *self.slots.get(&slot)?;
        let mut way = Vec::new();
        while node != ROOT_NODE {
            let found = self.node(node)?;
            way.push((found.name.clone(), node));
            node = found.parent;
        }
        way.reverse();
        Some(way)
    }

    /// What the kernel side looks a new cgroup up by. `None` for the root.
    pub(super) fn key(&self, node: u32) -> Option<NameKey> {
        let node = self.node(node)?;
        (node.parent != 0).then(|| {
            let mut name = [0; NAME_BYTES];
            name[..node.name.len()].copy_from_slice(node.name.as_bytes());
            NameKey { node: node.parent, name }
        })
    }

    /// What it finds.
    pub(super) fn value(&self, node: u32) -> Watched {
        let slot = self.node(node).and_then(|node| node.slot);
        Watched { slot: slot.map_or(NO_SLOT, |slot| slot.0), node }
    }

    /// The children of a node: name and node.
    pub(super) fn children(&self, node: u32) -> Vec<(String, u32)> {
        self.node(node)
            .map_or_else(Vec::new, |node| node.children.iter().map(|(n, c)| (n.clone(), *c)).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    #[test]
    fn paths_share_their_upper_nodes() {
        let mut names = Names::new();
        let a = names.insert(Slot(0), "/system.slice/a.service").unwrap();
        let b = names.insert(Slot(1), "/system.slice/b.service").unwrap();
        assert_eq!(a.len(), 2);
        assert_eq!(a[0], b[0]);
        assert_eq!(names.value(a[0]), Watched { slot: NO_SLOT, node: a[0] });
        assert_eq!(names.value(b[1]), Watched { slot: 1, node: b[1] });
        let key = names.key(a[1]).unwrap();
        assert_eq!(key.node, a[0]);
        assert!(key.name.starts_with(b"a.service\0"));
        assert_eq!(names.insert(Slot(0), "/system.slice/a.service").unwrap(), a, "again is the same");
        let way = names.way(Slot(1)).unwrap();
        assert_eq!(way, [("system.slice".to_owned(), b[0]), ("b.service".to_owned(), b[1])]);
        assert!(names.way(Slot(2)).is_none());
    }

    #[test]
    fn removal_leaves_what_others_need() {
        let mut names = Names::new();
        let a = names.insert(Slot(0), "/x/a").unwrap();
        let x = names.insert(Slot(1), "/x").unwrap();
        assert_eq!(names.remove(Slot(0)).iter().map(|(node, _)| *node).collect::<Vec<_>>(), [a[1]]);
        assert_eq!(names.remove(Slot(1)).iter().map(|(node, _)| *node).collect::<Vec<_>>(), x);
        assert_eq!(names.nodes.len(), 1);
        assert!(names.remove(Slot(1)).is_empty());
        names.insert(Slot(2), "/").unwrap();
        assert_eq!(names.value(ROOT_NODE).slot, 2);
        assert_eq!(names.way(Slot(2)), Some(vec![]));
        assert!(names.remove(Slot(2)).is_empty());
    }

    #[test]
    fn what_cannot_be_watched_is_refused() {
        let mut names = Names::new();
        assert!(matches!(names.insert(Slot(0), "a.service"), Err(WatchError::Path { .. })));
        assert!(matches!(names.insert(Slot(0), "/a/../b"), Err(WatchError::Path { .. })));
        assert!(matches!(
            names.insert(Slot(0), &format!("/{}", "x".repeat(256))),
            Err(WatchError::Path { .. })
        ));
        names.insert(Slot(0), "/a").unwrap();
        assert!(matches!(names.insert(Slot(1), "/a"), Err(WatchError::Taken { by: Slot(0), .. })));
        assert!(matches!(names.insert(Slot(0), "/b"), Err(WatchError::Busy { .. })));
        assert!(names.way(Slot(1)).is_none());
    }
}
