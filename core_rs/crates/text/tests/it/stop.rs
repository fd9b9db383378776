//! Stop strings against a reference that looks at the whole text.

use helix_text::{Out, StopMatcher};
use proptest::prelude::*;

/// The first end of a stop string ends the text; of those that end there, the longest counts.
fn reference(text: &str, stops: &[String]) -> (String, bool) {
    for (end, c) in text.char_indices() {
        let seen = &text[..end + c.len_utf8()];
        let longest = stops
            .iter()
            .filter(|s| !s.is_empty() && seen.ends_with(s.as_str()))
            .max_by_key(|s| s.len());
        if let Some(stop) = longest {
            return (seen[..seen.len() - stop.len()].to_string(), true);
        }
    }
    (text.to_string(), false)
}

/// Runs a matcher over the text cut at these places (in characters).
fn run(text: &str, stops: &[String], cuts: &[usize]) -> (String, bool) {
    let chars: Vec<char> = text.chars().collect();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (chars.len() + 1)).collect();
    cuts.extend([0, chars.len()]);
    cuts.sort_unstable();
    let mut matcher = StopMatcher::new(stops);
    let mut all = String::new();
    for pair in cuts.windows(2) {
        let piece: String = chars[pair[0]..pair[1]].iter().collect();
        let out = matcher.push(&piece);
        all.push_str(&out.emit);
        if out.stopped {
            assert!(matcher.stopped());
            assert_eq!(
                matcher.push("more"),
                Out {
                    emit: String::new(),
                    stopped: true
                }
            );
            assert_eq!(matcher.finish(), "");
            return (all, true);
        }
        // Everything that is held is the beginning of a stop string.
        let held = matcher.clone().finish();
        assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(&held)));
    }
    all.push_str(&matcher.finish());
    (all, false)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn every_split_gives_what_the_whole_text_gives(
        text in "[abü🙂]{0,24}",
        stops in prop::collection::vec("[abü🙂]{0,5}", 0..5),
        cuts in prop::collection::vec(0..25_usize, 0..10),
    ) {
        prop_assert_eq!(run(&text, &stops, &cuts), reference(&text, &stops));
    }
}

fn strings(stops: &[&str]) -> Vec<String> {
    stops.iter().map(ToString::to_string).collect()
}

#[test]
fn a_stop_string_across_pieces_is_never_emitted() {
    let mut matcher = StopMatcher::new(&["</end>"]);
    assert_eq!(
        matcher.push("text <"),
        Out {
            emit: "text ".into(),
            stopped: false
        }
    );
    assert_eq!(matcher.push("/e"), Out::default());
    assert_eq!(
        matcher.push("nd> after"),
        Out {
            emit: String::new(),
            stopped: true
        }
    );
}

#[test]
fn a_false_start_is_given_back() {
    let mut matcher = StopMatcher::new(&["aab"]);
    assert_eq!(matcher.push("aa").emit, "");
    assert_eq!(matcher.push("a").emit, "a");
    assert_eq!(matcher.push("c").emit, "aac");
    assert_eq!(matcher.push("a").emit, "");
    assert_eq!(matcher.finish(), "a");
}

#[test]
fn the_earliest_end_wins_and_the_longest_of_those() {
    assert_eq!(
        run("xabcd", &strings(&["abcd", "bc"]), &[]),
        ("xa".into(), true)
    );
    assert_eq!(
        run("xabcd", &strings(&["bc", "abc"]), &[]),
        ("x".into(), true)
    );
    assert_eq!(
        run("xabcd", &strings(&["abc", "bc"]), &[1, 2, 3]),
        ("x".into(), true)
    );
}

#[test]
fn without_stop_strings_text_passes() {
    let mut matcher = StopMatcher::new(&[""]);
    assert_eq!(
        matcher.push("anything"),
        Out {
            emit: "anything".into(),
            stopped: false
        }
    );
    assert_eq!(matcher.finish(), "");
}

#[test]
fn long_repetitive_stops_take_linear_time() {
    let stop = format!("{}b", "a".repeat(20_000));
    let mut matcher = StopMatcher::new(&[stop]);
    let mut emitted = 0;
    for _ in 0..50_000 {
        emitted += matcher.push("aa").emit.len();
    }
    assert_eq!(emitted, 80_000);
    assert!(matcher.push("b").stopped);
}
