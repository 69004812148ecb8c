use super::token::{self, JobToken};

/// Grows with every change of what ranks send each other. Ranks of different byte order do not understand each other either.
pub(super) const VERSION: u32 = 2 | if cfg!(target_endian = "big") { 1 << 31 } else { 0 };

/// What every connection of the engine begins with.
pub(super) const MAGIC: [u8; 8] = *b"FSEPrank";

/// What a rank says first on a connection. Its length never changes, so nobody can make a peer wait for more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub version: u32,
    pub world_size: u32,
    pub rank: u32,
    /// Where this rank listens for its peers; 0 if it does not.
    pub port: u16,
    token: [u8; token::MAX_LEN],
    token_len: u8,
}

impl Hello {
    pub const LEN: usize = MAGIC.len() + 4 + 4 + 4 + 2 + 1 + token::MAX_LEN;

    pub fn new(rank: usize, world_size: usize, port: u16, token: &JobToken) -> Self {
        Self {
            version: VERSION,
            world_size: world_size as u32,
            rank: rank as u32,
            port,
            token: *token.padded(),
            token_len: token.len() as u8,
        }
    }

    pub fn has_token(&self, token: &JobToken) -> bool {
        token.matches(&self.token, self.token_len)
    }

    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&self.world_size.to_le_bytes());
        bytes.extend_from_slice(&self.rank.to_le_bytes());
        bytes.extend_from_slice(&self.port.to_le_bytes());
        bytes.push(self.token_len);
        bytes.extend_from_slice(&self.token);
        bytes.try_into().expect("the fields add up to the length")
    }

    /// `None` if this is no hello at all.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let u32_at = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let mut token = [0; token::MAX_LEN];
        token.copy_from_slice(&rest[15..]);
        Some(Self {
            version: u32_at(0),
            world_size: u32_at(4),
            rank: u32_at(8),
            port: u16::from_le_bytes([rest[12], rest[13]]),
            token_len: rest[14],
            token,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_read_as_written() {
        let token = JobToken::random().unwrap();
        let hello = Hello::new(3, 70_000, 65_535, &token);
        let read = Hello::decode(&hello.encode()).unwrap();
        assert_eq!(read, hello);
        assert!(read.has_token(&token) && !read.has_token(&JobToken::random().unwrap()));
    }

    #[test]
    fn anything_else_is_no_hello() {
        assert_eq!(Hello::decode(&[b'G'; Hello::LEN]), None);
    }
}
