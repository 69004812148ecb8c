use std::path::Path;

use tokenizers::Tokenizer;

use crate::MoeHfError;

/// How text becomes token ids.
#[derive(Debug)]
pub enum TextCodec {
    /// As the model's tokenizer.json says.
    Tokenizer(Box<Tokenizer>),
    /// Each byte is a token: of models without a tokenizer.
    Bytes,
}

impl TextCodec {
    /// That of a model's folder.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Content`] if its tokenizer.json cannot be read, or has tokens that the model does not have;
    /// [`MoeHfError::Model`] if it has none and the model has fewer embeddings than there are bytes.
    pub fn open(folder: &Path, vocab_size: usize) -> Result<Self, MoeHfError> {
        let file = folder.join("tokenizer.json");
        if !file.is_file() {
            if vocab_size < 256 {
                return Err(MoeHfError::Model(format!(
                    "{} has no tokenizer.json, and a vocabulary of {vocab_size} is too small for bytes: put the model's \
                     tokenizer.json there",
                    folder.display()
                )));
            }
            return Ok(Self::Bytes);
        }
        let mut tokenizer = Tokenizer::from_file(&file).map_err(|error| MoeHfError::content(&file, error))?;
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest >= vocab_size {
            return Err(MoeHfError::content(
                &file,
                format!("it has a token {largest}, but the model only {vocab_size} embeddings: it is another model's"),
            ));
        }
        // Of whoever saved it: texts would end there, and prompts be filled up.
        tokenizer.with_truncation(None).map_err(|error| MoeHfError::content(&file, error))?;
        tokenizer.with_padding(None);
        Ok(Self::Tokenizer(Box::new(tokenizer)))
    }

    /// The tokens of a text. Bytes that are no UTF-8 are replaced where the tokenizer needs text.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Corpus`] if the tokenizer cannot.
    pub fn encode(&self, text: &[u8]) -> Result<Vec<u32>, MoeHfError> {
        match self {
            Self::Bytes => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            Self::Tokenizer(tokenizer) => {
                let encoding = tokenizer.encode_fast(String::from_utf8_lossy(text), false);
                Ok(encoding.map_err(|error| MoeHfError::Corpus(format!("tokenizer: {error}")))?.get_ids().to_vec())
            }
        }
    }

    /// The text of tokens.
    ///
    /// # Errors
    ///
    /// As [`TextCodec::encode`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, MoeHfError> {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| u8::try_from(token).unwrap_or(b'?')).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::Tokenizer(tokenizer) => {
                let text = tokenizer.decode(tokens, true);
                text.map_err(|error| MoeHfError::Corpus(format!("tokenizer: {error}")))
            }
        }
    }

    /// The text of tokens that come after others: many tokenizers leave out the space before the first token of all.
    ///
    /// # Errors
    ///
    /// As [`TextCodec::encode`].
    pub fn decode_after(&self, before: &[u32], tokens: &[u32]) -> Result<String, MoeHfError> {
        let whole = self.decode(&[before, tokens].concat())?;
        match whole.strip_prefix(&self.decode(before)?) {
            Some(text) => Ok(text.into()),
            None => self.decode(tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"to": 0, "be": 1, "or": 2, "not": 3, "?": 4}, "unk_token": "?"}}"#;

    #[test]
    fn a_tokenizer_is_taken_where_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = TextCodec::open(folder.path(), 256).unwrap();
        assert_eq!(bytes.encode(b"to be").unwrap(), [116, 111, 32, 98, 101]);
        assert_eq!(bytes.decode(&[116, 111, 300]).unwrap(), "to?");

        std::fs::write(folder.path().join("tokenizer.json"), WORDS).unwrap();
        let words = TextCodec::open(folder.path(), 5).unwrap();
        assert_eq!(words.encode(b"to be or not to bee").unwrap(), [0, 1, 2, 3, 0, 4]);
        assert_eq!(words.decode(&[3, 0]).unwrap(), "not to");
    }

    #[test]
    fn a_text_goes_on_with_its_space() {
        let folder = tempfile::tempdir().unwrap();
        let metaspace = r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}"#;
        let words =
            WORDS.replace(r#""decoder": null"#, &format!(r#""decoder": {metaspace}"#)).replace("\"not\"", "\"▁not\"");
        std::fs::write(folder.path().join("tokenizer.json"), words).unwrap();
        let codec = TextCodec::open(folder.path(), 5).unwrap();
        assert_eq!(codec.decode(&[3]).unwrap(), "not");
        assert_eq!(codec.decode_after(&[0], &[3]).unwrap(), " not");
        assert_eq!(
            TextCodec::Bytes.decode_after(&[116, 195], &[164, 111]).unwrap(),
            TextCodec::Bytes.decode(&[164, 111]).unwrap()
        );
    }

    #[test]
    fn texts_are_not_cut_off_where_a_tokenizer_was_saved_so() {
        let folder = tempfile::tempdir().unwrap();
        let truncation = r#"{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}"#;
        let padding = r#"{"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 4,
            "pad_type_id": 0, "pad_token": "?"}"#;
        let words = WORDS.replace(r#""truncation": null"#, &format!(r#""truncation": {truncation}"#));
        let words = words.replace(r#""padding": null"#, &format!(r#""padding": {padding}"#));
        std::fs::write(folder.path().join("tokenizer.json"), words).unwrap();
        let codec = TextCodec::open(folder.path(), 5).unwrap();
        assert_eq!(codec.encode(b"to be or not to be").unwrap(), [0, 1, 2, 3, 0, 1]);
    }

    #[test]
    fn what_is_of_another_model_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = |vocab_size| TextCodec::open(folder.path(), vocab_size).unwrap_err().to_string();
        assert!(error(255).contains("tokenizer.json"), "{}", error(255));
        std::fs::write(folder.path().join("tokenizer.json"), WORDS).unwrap();
        assert!(error(4).contains("it has a token 4"), "{}", error(4));
        std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
        assert!(error(5).contains("tokenizer.json"), "{}", error(5));
    }
}
