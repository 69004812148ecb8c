//! How what ranks say to each other travels: 8 bytes by which a rank is known, the version, the length, and a serde type as
//! MessagePack.

use std::io::{self, ErrorKind, Read};

use serde::{Serialize, de::DeserializeOwned};

/// Grows with every change of what ranks send each other. Ranks of different byte order do not understand each other either.
pub(super) const VERSION: u32 = 4 | if cfg!(target_endian = "big") { 1 << 31 } else { 0 };
const MAGIC: [u8; 8] = *b"FSEPrank";
/// Bytes of the header: the magic number, the version, the length.
pub(super) const HEADER: usize = MAGIC.len() + 4 + 4;
/// So much memory is taken on a peer's word; more only as data come.
const TRUSTED: usize = 16 << 20;

/// The version that the sender has, and the length of what it says.
pub(super) type Header = (u32, usize);

pub(super) fn encode(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &[0; 4]].concat();
    rmp_serde::encode::write(&mut bytes, message).expect("plain data, written to memory");
    let len = (bytes.len() - HEADER) as u32;
    bytes[HEADER - 4..HEADER].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// The header at the beginning of `bytes`; `None` as long as more are needed.
///
/// # Errors
///
/// If no rank begins so.
pub(super) fn header(bytes: &[u8]) -> io::Result<Option<Header>> {
    let start = bytes.len().min(MAGIC.len());
    if bytes[..start] != MAGIC[..start] {
        return Err(garbled());
    }
    let Some(numbers) = bytes.get(MAGIC.len()..HEADER) else { return Ok(None) };
    let number = |at: usize| u32::from_le_bytes([numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]]);
    Ok(Some((number(0), number(4) as usize)))
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    rmp_serde::from_slice(bytes).map_err(|_| garbled())
}

/// Reads a message of at most `limit` bytes; `None` where the peer closed the connection between two messages.
pub(super) fn read<T: DeserializeOwned>(reader: &mut impl Read, limit: usize) -> io::Result<Option<T>> {
    let mut bytes = [0; HEADER];
    let read = loop {
        match reader.read(&mut bytes) {
            Ok(0) => return Ok(None),
            Ok(read) => break read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    reader.read_exact(&mut bytes[read..])?;
    match header(&bytes)? {
        Some((_, len)) if len <= limit => decode(&read_bytes(reader, len)?).map(Some),
        _ => Err(garbled()),
    }
}

pub(super) fn read_bytes(reader: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len.min(TRUSTED));
    reader.take(len as u64).read_to_end(&mut bytes)?;
    if bytes.len() < len { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

pub(super) fn garbled() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "it sent something that is no message of this engine")
}
