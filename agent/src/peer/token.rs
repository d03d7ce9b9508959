//! The token with which a node joins: one line of text that a person carries from one node to another.
//!
//! It tells the new node where to ask, by whom to expect an answer (the fingerprint of the cluster's CA, so that nobody
//! in between can pose as the cluster), and the secret that allows one node to be taken in, once.

use std::net::SocketAddr;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};

/// What a token begins with, for people and for formats to come.
const PREFIX: &str = "ftd1-";
/// Longer ones are not looked at.
const LONGEST: usize = 2048;
/// At most so many addresses.
pub(super) const ADDRESSES: usize = 8;

/// A token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Token {
    /// blake3 of the CA's certificate.
    pub(super) authority: [u8; 32],
    /// The node that takes in.
    pub(super) node: String,
    /// Where it listens.
    pub(super) addresses: Vec<SocketAddr>,
    /// What it wants to hear.
    pub(super) secret: [u8; 32],
    /// Until when, seconds since 1970 by that node's clock.
    pub(super) until: i64,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("node", &self.node).field("until", &self.until).finish_non_exhaustive()
    }
}

impl Token {
    /// The token as text.
    pub(super) fn text(&self) -> String {
        let mut bytes = postcard::to_stdvec(self).unwrap_or_default();
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }

    /// The token in this text, or why it is none.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let text = text.trim();
        let coded = text.strip_prefix(PREFIX).ok_or("it does not begin with \"ftd1-\"")?;
        if coded.len() > LONGEST {
            return Err("it is too long");
        }
        let broken = "it is cut short or mistyped";
        let bytes = BASE64URL_NOPAD.decode(coded.as_bytes()).map_err(|_| broken)?;
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or(broken)?;
        if crc32fast::hash(body).to_le_bytes() != *crc {
            return Err(broken);
        }
        let (token, rest): (Self, _) = postcard::take_from_bytes(body).map_err(|_| broken)?;
        let sound = rest.is_empty()
            && crate::config::cluster::name_flaw(&token.node).is_none()
            && (1..=ADDRESSES).contains(&token.addresses.len());
        sound.then_some(token).ok_or("it makes no sense; is it of another version of ftd?")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token {
            authority: [7; 32],
            node: "vm1".into(),
            addresses: vec!["10.0.0.1:7443".parse().unwrap(), "[fd00::1]:7443".parse().unwrap()],
            secret: [9; 32],
            until: 1_800_000_000,
        }
    }

    #[test]
    fn it_is_one_word_and_comes_back_as_it_was() {
        let text = token().text();
        assert!(text.len() < 200 && !text.contains(char::is_whitespace), "{text}");
        assert_eq!(Token::parse(&format!("  {text}\n")).unwrap(), token());
        assert!(!format!("{:?}", token()).contains('9'), "the secret is not logged");
    }

    #[test]
    fn a_slip_anywhere_is_noticed() {
        let text = token().text();
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            Token::parse(std::str::from_utf8(&bytes).unwrap()).unwrap_err();
            Token::parse(&text[..at]).unwrap_err();
        }
        Token::parse(&format!("{text}A")).unwrap_err();
    }

    proptest! {
        #[test]
        fn noise_is_no_token(body in prop::collection::vec(any::<u8>(), 0..300), text in ".*") {
            // As if somebody had made a checksum for it.
            let sealed = [body.as_slice(), &crc32fast::hash(&body).to_le_bytes()].concat();
            if let Ok(token) = Token::parse(&format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&sealed))) {
                prop_assert!(!token.addresses.is_empty());
            }
            prop_assert!(Token::parse(&text).is_err());
        }
    }
}
