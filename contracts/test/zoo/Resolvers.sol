// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IProofVerifier, IResolver} from "../../src/interfaces/IResolver.sol";

/// @dev A resolver that can misbehave in every way that a call lets it.
contract StrangeResolver is IResolver {
    enum Mood {
        Honest,
        Reverting,
        GasBurner,
        ReturnBomb,
        ShortReturn,
        EmptyReturn,
        Wild,
        HighBits,
        Reentrant,
        Hungry,
        MindChanger
    }

    Mood public onBegin;
    Mood public onOutcome;
    Outcome public answer;
    uint256 public begun;
    /// @dev Gas seen at the first line of `begin`.
    uint256 public gasSeen;
    address private _target;
    bytes private _attack;
    bool public attackWorked;
    bytes public attackAnswer;

    function set(Mood onBegin_, Mood onOutcome_, Outcome answer_) external {
        (onBegin, onOutcome, answer) = (onBegin_, onOutcome_, answer_);
    }

    function arm(address target, bytes calldata attack) external {
        (_target, _attack) = (target, attack);
    }

    function begin(bytes32, bytes32, bytes32, bytes32) external {
        uint256 left = gasleft();
        _behave(onBegin);
        if (onBegin == Mood.Reentrant) (attackWorked, attackAnswer) = _target.call(_attack);
        // Needs nearly all that it may have.
        if (onBegin == Mood.Hungry) while (gasleft() > 60_000) {}
        if (onBegin == Mood.Hungry && left < 390_000) revert("starved");
        gasSeen = left;
        begun += 1;
    }

    function outcome(bytes32) external view returns (Outcome) {
        _behave(onOutcome);
        if (onOutcome == Mood.Hungry) while (gasleft() > 5_000) {}
        if (onOutcome == Mood.MindChanger) return block.timestamp % 2 == 0 ? Outcome.Accept : Outcome.Reject;
        if (onOutcome == Mood.Reentrant) {
            (bool ok,) = _target.staticcall(_attack);
            return ok ? Outcome.Accept : Outcome.Draw;
        }
        return answer;
    }

    function _behave(Mood mood) private view {
        if (mood == Mood.Reverting) revert("no");
        if (mood == Mood.GasBurner) while (true) {}
        uint256 word = uint256(answer);
        assembly {
            switch mood
            case 3 { return(0, 100000) }
            case 4 {
                mstore(0, shl(8, word))
                return(0, 31)
            }
            case 5 { return(0, 0) }
            case 6 {
                mstore(0, 4)
                return(0, 32)
            }
            case 7 {
                mstore(0, or(shl(255, 1), word))
                return(0, 32)
            }
        }
    }
}

/// @dev A proof system whose proof is its verdict: one byte.
contract ProofStub is IProofVerifier {
    function verify(bytes32 specHash, bytes32 resultHash, bytes calldata proof) external pure returns (Verdict) {
        if (proof.length != 65 || bytes32(proof[1:33]) != specHash || bytes32(proof[33:65]) != resultHash) {
            return Verdict.Invalid;
        }
        return Verdict(uint8(proof[0]));
    }
}
