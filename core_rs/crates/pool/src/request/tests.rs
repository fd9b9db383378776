//! Every check with a value that passes and one that does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

const CAPACITY: Capacity = Capacity {
    slots: 1,
    max_len: 16,
    vocab_size: 100,
    candidates: 0,
};

fn request() -> v1::GenerateRequest {
    v1::GenerateRequest {
        inputs: vec![v1::Input::default()],
        n: 2,
        ..Default::default()
    }
}

#[test]
fn the_first_choice_keeps_the_seed_and_the_others_differ() {
    let sampling = v1::Sampling {
        seed: Some(7),
        top_p: 1.0,
        repetition_penalty: 1.0,
        ..Default::default()
    };
    let wishes = Wishes::check(
        &v1::GenerateRequest {
            sampling: Some(sampling),
            ..request()
        },
        CAPACITY,
    )
    .unwrap();
    assert_eq!(wishes.params(0).seed, 7);
    assert_ne!(wishes.params(1).seed, 7);
    assert_eq!(wishes.params(2).seed, 7, "the second prompt starts over");
    let free = Wishes::check(&request(), CAPACITY).unwrap();
    assert_ne!(free.params(2).seed, free.params(0).seed);
    assert_ne!(
        Wishes::check(&request(), CAPACITY).unwrap().params(0).seed,
        free.params(0).seed
    );
}

#[test]
fn wrong_values_are_refused_by_name() {
    let refused = |change: fn(&mut v1::GenerateRequest)| {
        let mut wrong = request();
        change(&mut wrong);
        let error = Wishes::check(&wrong, CAPACITY).unwrap_err();
        assert_eq!(error.code, Code::InvalidRequest);
        error.param.unwrap()
    };
    assert_eq!(refused(|r| r.inputs.clear()), "prompt");
    assert_eq!(refused(|r| r.n = 5000), "n");
    assert_eq!(refused(|r| r.logprobs = Some(21)), "top_logprobs");
    assert_eq!(refused(|r| r.stop = vec!["x".repeat(5000)]), "stop");
    let sampling = |edit: fn(&mut v1::Sampling)| {
        let mut sampling = v1::Sampling {
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..Default::default()
        };
        edit(&mut sampling);
        let wrong = v1::GenerateRequest {
            sampling: Some(sampling),
            ..request()
        };
        Wishes::check(&wrong, CAPACITY).unwrap_err().param.unwrap()
    };
    assert_eq!(sampling(|s| s.temperature = f32::NAN), "temperature");
    assert_eq!(
        sampling(|s| s.logit_bias = vec![v1::LogitBias {
            token: 1,
            bias: 101.0
        }]),
        "logit_bias"
    );
    assert_eq!(
        sampling(|s| s.logit_bias = vec![v1::LogitBias {
            token: 100,
            bias: 1.0
        }]),
        "logit_bias"
    );
}

#[test]
fn an_answer_that_is_held_has_a_limit() {
    let wishes = |logprobs, echo| {
        let request = v1::GenerateRequest {
            logprobs,
            echo,
            ..request()
        };
        Wishes::check(&request, CAPACITY).unwrap()
    };
    let golden = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../tests/fixtures/golden/llama-tiny"
    );
    let detokenizer = helix_text::TextModel::load(golden.as_ref())
        .unwrap()
        .detokenizer();
    let prompt = |max_new| Prompt {
        ids: vec![1; 8].into(),
        max_new,
        shared: 0,
        echo: None,
        detokenizer: detokenizer.clone(),
    };
    // Two choices of 2^20 tokens, each with one alternative.
    let most = 1 << 20;
    assert!(
        wishes(Some(1), false)
            .check_held(&[prompt(most - 8), prompt(8)])
            .is_ok()
    );
    for refused in [
        wishes(Some(1), false).check_held(&[prompt(most + 1)]),
        wishes(Some(1), true).check_held(&[prompt(most)]),
        wishes(Some(20), false).check_held(&[prompt(most)]),
    ] {
        assert_eq!(refused.unwrap_err().param.as_deref(), Some("logprobs"));
    }
    assert!(
        wishes(None, true)
            .check_held(&vec![prompt(u32::MAX); 512])
            .is_ok()
    );
}

#[test]
fn the_context_is_shared_by_prompt_and_answer() {
    assert_eq!(room(10, None, 16, "prompt").unwrap(), 6);
    assert_eq!(room(10, Some(6), 16, "prompt").unwrap(), 6);
    assert_eq!(room(10, Some(7), 16, "prompt").unwrap(), 6);
    assert_eq!(room(10, Some(u32::MAX), 16, "prompt").unwrap(), 6);
    assert_eq!(room(16, Some(0), 16, "prompt").unwrap(), 0);
    for (prompt, wanted) in [(16, None), (16, Some(7)), (17, Some(0)), (40, None)] {
        let error = room(prompt, wanted, 16, "messages").unwrap_err();
        assert_eq!(error.code, Code::ContextLengthExceeded);
        assert!(
            error
                .message
                .contains("maximum context length is 16 tokens. However, you"),
            "{}",
            error.message
        );
        assert_eq!(error.param.as_deref(), Some("messages"));
    }
    assert_eq!(
        room(0, None, 16, "prompt").unwrap_err().code,
        Code::InvalidRequest
    );
}

#[test]
fn timeouts_take_the_earlier_one() {
    assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
    assert_eq!(
        grpc_timeout("99999999H"),
        Some(Duration::from_secs(99_999_999 * 3600))
    );
    for wrong in ["", "m", "1", "x1m", "123456789m", "1é"] {
        assert_eq!(grpc_timeout(wrong), None, "{wrong}");
    }
    let default = Duration::from_secs(9);
    assert_eq!(timeout(0, None, default), default);
    assert_eq!(
        timeout(5, Some(Duration::from_millis(3)), default),
        Duration::from_millis(3)
    );
    assert_eq!(
        timeout(5, Some(Duration::from_secs(3)), default),
        Duration::from_millis(5)
    );
}

#[test]
fn names_of_choices_come_apart_again() {
    assert_eq!(split(sequence_id(70_000, 1023)), (70_000, 1023));
}
