// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Who judges disputes about results
/// @notice Named in a quote, so both sides have agreed to it. A resolver moves no money: it only says, by job, what it found.
/// Warning: a resolver that reverts, burns its gas or never answers is a silent one, and the dispute ends as a draw.
interface IResolver {
    /// @dev Of the client's challenge. None: nothing decided (yet).
    enum Outcome {
        None,
        Accept,
        Reject,
        Draw
    }

    /// @notice Disputes only: a case for this resolver. Gets at most `BEGIN_GAS` gas.
    function begin(bytes32 jobId, bytes32 specHash, bytes32 resultHash, bytes32 evidence) external;

    /// @notice Final once it is not None. Gets at most `OUTCOME_GAS` gas.
    function outcome(bytes32 jobId) external view returns (Outcome);
}

/// @title A proof system behind a resolver
interface IProofVerifier {
    enum Verdict {
        Invalid,
        Correct,
        Wrong
    }

    /// @notice What `proof` shows about the claim "running `specHash` gives `resultHash`". Invalid: nothing.
    function verify(bytes32 specHash, bytes32 resultHash, bytes calldata proof) external view returns (Verdict);
}
